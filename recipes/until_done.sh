#!/bin/sh
# Run a command until it ends well:  sh recipes/until_done.sh COMMAND...
#
# It is started again after code 75 (another host was lost), after a signal such as SIGTERM, and
# after what kills a process; it then resumes from its last checkpoint. A mistake (2), a bug (1), a
# command that is not there (126, 127) and Ctrl-C (130) end it. So does the fifth failure in a row
# within two minutes of its start, as of a process that lacks memory every time.

set -u
fast=0
begin=$(date +%s)
until "$@"
do
  code=$?
  case $code in
    1 | 2 | 126 | 127 | 130) exit "$code" ;;
  esac

  # A run that lasted has made progress: what follows counts anew.
  if [ "$(($(date +%s) - begin))" -lt 120 ]
  then
    fast=$((fast + 1))
  else
    fast=0
  fi
  if [ "$fast" -ge 5 ]
  then
    exit "$code"
  fi
  sleep 10
  begin=$(date +%s)
done
