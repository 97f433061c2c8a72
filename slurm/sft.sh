#!/usr/bin/env bash
# Fine-tune on a Slurm cluster:   sbatch [options of sbatch] slurm/sft.sh CONFIG [section.key=value ...]
# Submit from the checkout (or set SFT_ROOT). Options on sbatch's command line win over those below; partition, account
# and the like belong there, into SBATCH_* variables, or into slurm/site.env. slurm/README.md says more.
#SBATCH --job-name=sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR2@300
set -euo pipefail

root=${SFT_ROOT:-$SLURM_SUBMIT_DIR}
if [ ! -f "$root/steadfast.py" ]; then
  echo "error: no steadfast.py in $root; submit from the checkout, or set SFT_ROOT to it" >&2
  exit 66
fi
cd "$SLURM_SUBMIT_DIR"
if [ -f "$root/slurm/site.env" ]; then
  set -a # what the site sets is for the ranks, too
  # shellcheck source=/dev/null
  . "$root/slurm/site.env"
  set +a
fi
python=${SFT_HOST_PYTHON:-${SFT_PYTHON:-$root/.venv/bin/python}}
if ! command -v "$python" >/dev/null; then
  echo "error: no Python at $python; run make install in $root, or set SFT_HOST_PYTHON or SFT_PYTHON" >&2
  exit 66
fi
trap '' USR2 # until our successor listens, a warning must not kill it
exec "$python" "$root/steadfast.py" launch slurm-job "$@"
