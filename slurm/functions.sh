# shellcheck shell=bash
# What pipeline.sh, on the login node, and lib.sh, in jobs, have in common.

# row EVENT JOB [FIELDS]: a row of the records; FIELDS is JSON, without the braces.
row() { printf '{"event": "%s", "job": "%s", "time": "%s"%s}\n' "$1" "$2" "$(date -u '+%FT%TZ')" "${3:+, $3}"; }

# image_there IMAGE: unless it is a file that is not there; others are a registry's.
image_there() { [[ $1 != /* && $1 != ./* && $1 != *.sif && $1 != *.sqsh || -e $1 ]]; }
