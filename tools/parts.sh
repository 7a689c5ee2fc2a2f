#!/bin/sh
# Runs targets of the Makefile one after another and says at the end what each has cost: parts.sh "MAKE" TARGET...
# The first that fails ends the run; the table comes all the same.
set -eu
cd "$(dirname "$0")/.."
make=$1
shift
table=$(mktemp)
finish() {
    awk 'BEGIN { print "==> seconds" } { printf "%6d  %s\n", $2, $1; all += $2 } END { printf "%6d  all\n", all }' "$table"
    rm "$table"
}
trap finish EXIT
for part; do
    began=$(date +%s)
    status=0
    $make --no-print-directory "$part" || status=$?
    echo "$part $(($(date +%s) - began))" >> "$table"
    [ $status = 0 ] || exit $status
done
