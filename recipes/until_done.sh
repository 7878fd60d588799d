#!/bin/sh
# Run a command until it ends well:  sh recipes/until_done.sh COMMAND...
#
# It is started again after code 75 (another host was lost), after a signal such as SIGTERM, and
# after what kills a process; it then resumes from its last checkpoint. A mistake (2), a bug (1)
# and Ctrl-C (130) end it.

set -u
until "$@"
do
  code=$?
  if [ "$code" -le 2 ] || [ "$code" -eq 130 ]
  then
    exit "$code"
  fi
  sleep 10
done
