"""Physics-IQ (Motamed et al. 2025, arXiv 2501.09038): how well predicted videos move as real ones.

    protocol     rates, lengths, names
    files        the data set's folders, and the checks before any work
    comparison   the size and rate at which videos are compared
    masks        where something moves
    measures     overlap of motion and pixel errors of one view
    scores       the table of a whole data set and the score
    work         whole views, over processes
    pictures     what was compared, to look at
"""
