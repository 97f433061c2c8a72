#!/bin/sh
# Debian's Slurm for the drills, when this is a Debian or Ubuntu machine and we are root; else the drills say what they
# miss and are skipped. No service is started.
set -eu
missing=
for program in slurmctld slurmd sbatch munged ip; do
  command -v "$program" >/dev/null || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "not installed:$missing (needs root and apt-get); the drills will be skipped" >&2
  exit 0
fi
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends \
  slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2; } >/dev/null; then
  echo "apt-get could not install Slurm; the drills will be skipped" >&2
fi
