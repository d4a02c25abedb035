#!/usr/bin/env bash
# Slurm and munge for `make test-slurm`, where they are absent: programs only, nothing of the system's is configured.
set -euo pipefail
missing=()
for program in munged slurmctld slurmd sbatch srun scontrol; do
  command -v "$program" >/dev/null || missing+=("$program")
done
if ((${#missing[@]} == 0)); then
  exit 0
fi
if ((EUID != 0)); then
  echo "error: ${missing[*]} not found, and installing slurm-wlm and munge needs root, got user $(id -un)" >&2
  exit 1
fi
if ! command -v apt-get >/dev/null; then
  echo "error: ${missing[*]} not found, and this system has no apt-get: install Slurm and munge yourself" >&2
  exit 1
fi
# The packages would start daemons of their own: a policy for the time of the installation says no.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null
