# What the scripts of this folder share. Sourced, never run. What talks to clouds from here must
# also run with the bash 3.2 of macOS.
# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are for the script that sources this

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {  # the comment at the top of the script
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

need() {  # programs that the script cannot do without
  local program
  for program in "$@"; do
    command -v "$program" >/dev/null || fail "there is no $program on the PATH"
  done
}

whole_number() {  # flag, value, least
  [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "$1 must be a whole number, got '$2'"
  (( $2 >= $3 )) ||
    fail "$1 must be a whole number, at least $3, got '$2'"
}

no_control_characters() {
  local argument
  for argument in "$@"; do
    [[ $argument != *[[:cntrl:]]* ]] ||
      fail "there are line breaks or other control characters in $(printf %q "$argument")"
  done
}

quoted() {  # a command as a shell reads it back
  local word out='' escaped="'\\''"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      word="'${word//\'/"$escaped"}'"
    fi
    out+="${out:+ }$word"
  done
  printf '%s' "$out"
}

# A checkpoint is written under another name and then renamed. In a bucket without folders of its
# own (flat namespace) gcsfuse renames file by file, and only folders of fewer files than this.
readonly RENAME_LIMIT=200000

dry_run=0
run() {  # a command; with --dry_run shows it instead
  if (( dry_run )); then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# The Python of $VENV, if that is set, else of the active environment.
find_python() {
  python=python
  if [[ -n ${VENV:-} ]]; then
    python=$VENV/bin/python
  fi
  command -v "$python" >/dev/null || fail "there is no ${python}; set VENV=FOLDER to an" \
    "environment with videogpt_jax or activate it"
}

# Of the trainer's flags: refuses those that the script itself gives, and sets `workdir`.
trainer_flags() {  # flags that are refused, --, the trainer's flags
  local refused=() flag config='' name
  while [[ $1 != -- ]]; do
    refused+=("$1")
    shift
  done
  shift
  workdir=
  while (( $# )); do
    for flag in ${refused[@]+"${refused[@]}"}; do
      [[ $1 != "$flag" && $1 != "$flag="* ]] || fail "leave out $flag: this script gives it"
    done
    name=${1%%=*}
    case $name in
      --config) config=given ;;
      --workdir)
        if [[ $1 == *=* ]]; then
          workdir=${1#*=}
        else
          workdir=${2:-}
        fi ;;
    esac
    shift
  done
  [[ -n $config ]] || fail "no --config=FILE; the trainer's flags come after --, such as" \
    "-- --config=configs/stage1.py --workdir=DIR"
  [[ -n $workdir ]] || fail "no --workdir=DIR among the trainer's flags (after --)"
}

# A text without control characters as a JSON string, which is a YAML string, too.
json() {
  local text=$1 out='' i char
  for (( i = 0; i < ${#text}; i++ )); do
    char=${text:i:1}
    case $char in
      '"' | "\\") out+="\\$char" ;;
      *) out+=$char ;;
    esac
  done
  printf '"%s"' "$out"
}

# Several texts as a JSON list of strings.
json_list() {
  local out='' text
  for text in "$@"; do
    out+="${out:+, }$(json "$text")"
  done
  printf '[%s]' "$out"
}

# A text as Kubernetes has to get it so that the program gets the text: it replaces $(NAME),
# and $$ by $.
literal() {
  local text=$1 out='' i char
  for (( i = 0; i < ${#text}; i++ )); do
    char=${text:i:1}
    out+=$char
    [[ $char != '$' ]] || out+=$char
  done
  printf '%s' "$out"
}

# A template with VALUE in every place of ${NAME}. In one pass, so that nothing is replaced
# within a value.
fill_in() {  # template, NAME=VALUE...
  local text out='' place name field
  [[ -r $1 ]] || fail "there is no $1"
  text=$(< "$1")
  shift
  while [[ $text =~ \$\{([A-Z]+)\} ]]; do
    place=${BASH_REMATCH[0]} name=${BASH_REMATCH[1]}
    for field in "$@" ''; do
      [[ $field != "$name="* ]] || break
    done
    [[ -n $field ]] || fail "nothing is known about $place in the template"
    out+=${text%%"$place"*}${field#*=}
    text=${text#*"$place"}
  done
  printf '%s\n' "$out$text"
}

# The volume /data of a pod, a claim or a bucket: sets `volume` and `annotations`.
data_volume() {  # claim, bucket
  [[ -n $1 || -n $2 ]] ||
    fail "no --claim=NAME or --bucket=NAME: a volume that all pods see"
  [[ -z $1 || -z $2 ]] || fail "--claim and --bucket exclude each other"
  if [[ -n $1 ]]; then
    annotations="{}"
    volume="\"persistentVolumeClaim\": {\"claimName\": $(json "$1")}"
  else
    annotations='{"gke-gcsfuse/volumes": "true"}'
    # Without caches every pod sees at once what the others have written.
    local options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
    options+=,file-system:rename-dir-limit:$RENAME_LIMIT
    volume="\"csi\": {\"driver\": \"gcsfuse.csi.storage.gke.io\", \"volumeAttributes\": "
    volume+="{\"bucketName\": $(json "$2"), \"mountOptions\": \"$options\"}}"
  fi
  volume="{\"name\": \"data\", $volume}"
}

# Gives a manifest to kubectl; with --dry_run shows it instead.
create() {  # manifest, what to say if that fails
  if (( dry_run )); then
    echo "# kubectl create --filename=-    (reads what follows)"
    printf '%s\n' "$1"
    return
  fi
  # `create`, not `apply`: a job cannot be changed, and `apply` would do nothing, silently.
  kubectl create --filename=- <<< "$1" || {
    local status=$?
    echo "error: not submitted. $2" >&2
    return "$status"
  }
}
