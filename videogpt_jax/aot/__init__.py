"""Programs compiled for accelerators that are not there, and what the compilers say of them."""
