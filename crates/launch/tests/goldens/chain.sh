#!/bin/bash
set -eu
mkdir -p runs/demo-nano/launch/logs

prepare=$(sbatch --parsable <<'END0'
#!/bin/bash
#SBATCH --job-name=demo-nano-prepare
#SBATCH --output=runs/demo-nano/launch/logs/%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@30
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=4:00:00
#SBATCH --mem=64G
#SBATCH "--comment=the nano pair"
export HF_HOME=/data/hf
export HF_HUB_OFFLINE=1
module load cuda/12.8

# Slurm signals this shell before the time limit and when it takes the node away.
signals=0
trap 'signals=$((signals + 1)); kill -TERM $worker 2>/dev/null' TERM
proxykv-train prepare --recipe recipes/demo-nano.toml --runs runs --device auto &
worker=$!
# A signal ends `wait`, and the worker only after its example.
seen=-1
while [ $seen != $signals ]; do
  seen=$signals
  wait $worker
  code=$?
done
# 0: done; 1 and 2: the input is refused; 130 and 143: stopped; others: the machine failed.
again=
case $code in
  0 | 1 | 2) ;;
  130 | 143) again=yes ;;
  *) [ ${SLURM_RESTART_COUNT:-0} -lt 10 ] && again=yes ;;
esac
# Back to the queue, unless scancel or a pre-emption ends this job.
if [ -n "$again" ] && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $code
END0
)
prepare=${prepare%%;*}
echo "prepare $prepare"

label=$(sbatch --parsable --dependency=afterok:"$prepare" <<'END0'
#!/bin/bash
#SBATCH --job-name=demo-nano-label
#SBATCH --output=runs/demo-nano/launch/logs/%x-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@30
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --array=0-3
#SBATCH --gres=gpu:1
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=4:00:00
#SBATCH --mem=64G
#SBATCH "--comment=the nano pair"
export HF_HOME=/data/hf
export HF_HUB_OFFLINE=1
module load cuda/12.8

# Slurm signals this shell before the time limit and when it takes the node away.
signals=0
trap 'signals=$((signals + 1)); kill -TERM $worker 2>/dev/null' TERM
proxykv-train label --recipe recipes/demo-nano.toml --runs runs --device auto --task "$SLURM_ARRAY_TASK_ID/4" &
worker=$!
# A signal ends `wait`, and the worker only after its example.
seen=-1
while [ $seen != $signals ]; do
  seen=$signals
  wait $worker
  code=$?
done
# 0: done; 1 and 2: the input is refused; 130 and 143: stopped; others: the machine failed.
again=
case $code in
  0 | 1 | 2) ;;
  130 | 143) again=yes ;;
  *) [ ${SLURM_RESTART_COUNT:-0} -lt 10 ] && again=yes ;;
esac
# Back to the queue, unless scancel or a pre-emption ends this job.
if [ -n "$again" ] && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $code
END0
)
label=${label%%;*}
echo "label $label"

extract=$(sbatch --parsable --dependency=afterok:"$label" <<'END0'
#!/bin/bash
#SBATCH --job-name=demo-nano-extract
#SBATCH --output=runs/demo-nano/launch/logs/%x-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@30
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --array=0-3
#SBATCH --gres=gpu:1
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=4:00:00
#SBATCH --mem=64G
#SBATCH "--comment=the nano pair"
export HF_HOME=/data/hf
export HF_HUB_OFFLINE=1
module load cuda/12.8

# Slurm signals this shell before the time limit and when it takes the node away.
signals=0
trap 'signals=$((signals + 1)); kill -TERM $worker 2>/dev/null' TERM
proxykv-train extract --recipe recipes/demo-nano.toml --runs runs --device auto --task "$SLURM_ARRAY_TASK_ID/4" &
worker=$!
# A signal ends `wait`, and the worker only after its example.
seen=-1
while [ $seen != $signals ]; do
  seen=$signals
  wait $worker
  code=$?
done
# 0: done; 1 and 2: the input is refused; 130 and 143: stopped; others: the machine failed.
again=
case $code in
  0 | 1 | 2) ;;
  130 | 143) again=yes ;;
  *) [ ${SLURM_RESTART_COUNT:-0} -lt 10 ] && again=yes ;;
esac
# Back to the queue, unless scancel or a pre-emption ends this job.
if [ -n "$again" ] && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $code
END0
)
extract=${extract%%;*}
echo "extract $extract"

train=$(sbatch --parsable --dependency=afterok:"$extract" <<'END0'
#!/bin/bash
#SBATCH --job-name=demo-nano-train
#SBATCH --output=runs/demo-nano/launch/logs/%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@30
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --gres=gpu:1
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=4:00:00
#SBATCH --mem=64G
#SBATCH "--comment=the nano pair"
export HF_HOME=/data/hf
export HF_HUB_OFFLINE=1
module load cuda/12.8

# Slurm signals this shell before the time limit and when it takes the node away.
signals=0
trap 'signals=$((signals + 1)); kill -TERM $worker 2>/dev/null' TERM
proxykv-train train --recipe recipes/demo-nano.toml --runs runs --device auto &
worker=$!
# A signal ends `wait`, and the worker only after its example.
seen=-1
while [ $seen != $signals ]; do
  seen=$signals
  wait $worker
  code=$?
done
# 0: done; 1 and 2: the input is refused; 130 and 143: stopped; others: the machine failed.
again=
case $code in
  0 | 1 | 2) ;;
  130 | 143) again=yes ;;
  *) [ ${SLURM_RESTART_COUNT:-0} -lt 10 ] && again=yes ;;
esac
# Back to the queue, unless scancel or a pre-emption ends this job.
if [ -n "$again" ] && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $code
END0
)
train=${train%%;*}
echo "train $train"

eval=$(sbatch --parsable --dependency=afterok:"$train" <<'END0'
#!/bin/bash
#SBATCH --job-name=demo-nano-eval
#SBATCH --output=runs/demo-nano/launch/logs/%x-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@30
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --array=0-3
#SBATCH --gres=gpu:1
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=4:00:00
#SBATCH --mem=64G
#SBATCH "--comment=the nano pair"
export HF_HOME=/data/hf
export HF_HUB_OFFLINE=1
module load cuda/12.8

# Slurm signals this shell before the time limit and when it takes the node away.
signals=0
trap 'signals=$((signals + 1)); kill -TERM $worker 2>/dev/null' TERM
proxykv-train eval --recipe recipes/demo-nano.toml --runs runs --device auto --task "$SLURM_ARRAY_TASK_ID/4" &
worker=$!
# A signal ends `wait`, and the worker only after its example.
seen=-1
while [ $seen != $signals ]; do
  seen=$signals
  wait $worker
  code=$?
done
# 0: done; 1 and 2: the input is refused; 130 and 143: stopped; others: the machine failed.
again=
case $code in
  0 | 1 | 2) ;;
  130 | 143) again=yes ;;
  *) [ ${SLURM_RESTART_COUNT:-0} -lt 10 ] && again=yes ;;
esac
# Back to the queue, unless scancel or a pre-emption ends this job.
if [ -n "$again" ] && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $code
END0
)
eval=${eval%%;*}
echo "eval $eval"

export=$(sbatch --parsable --dependency=afterok:"$eval" <<'END0'
#!/bin/bash
#SBATCH --job-name=demo-nano-export
#SBATCH --output=runs/demo-nano/launch/logs/%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@30
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --gres=gpu:1
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=4:00:00
#SBATCH --mem=64G
#SBATCH "--comment=the nano pair"
export HF_HOME=/data/hf
export HF_HUB_OFFLINE=1
module load cuda/12.8

# Slurm signals this shell before the time limit and when it takes the node away.
signals=0
trap 'signals=$((signals + 1)); kill -TERM $worker 2>/dev/null' TERM
proxykv-train export --recipe recipes/demo-nano.toml --runs runs --device auto &
worker=$!
# A signal ends `wait`, and the worker only after its example.
seen=-1
while [ $seen != $signals ]; do
  seen=$signals
  wait $worker
  code=$?
done
# 0: done; 1 and 2: the input is refused; 130 and 143: stopped; others: the machine failed.
again=
case $code in
  0 | 1 | 2) ;;
  130 | 143) again=yes ;;
  *) [ ${SLURM_RESTART_COUNT:-0} -lt 10 ] && again=yes ;;
esac
# Back to the queue, unless scancel or a pre-emption ends this job.
if [ -n "$again" ] && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $code
END0
)
export=${export%%;*}
echo "export $export"

report=$(sbatch --parsable --dependency=afterok:"$export" <<'END0'
#!/bin/bash
#SBATCH --job-name=demo-nano-report
#SBATCH --output=runs/demo-nano/launch/logs/%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@30
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=4:00:00
#SBATCH --mem=64G
#SBATCH "--comment=the nano pair"
export HF_HOME=/data/hf
export HF_HUB_OFFLINE=1
module load cuda/12.8

# Slurm signals this shell before the time limit and when it takes the node away.
signals=0
trap 'signals=$((signals + 1)); kill -TERM $worker 2>/dev/null' TERM
proxykv-train report --recipe recipes/demo-nano.toml --runs runs --device auto &
worker=$!
# A signal ends `wait`, and the worker only after its example.
seen=-1
while [ $seen != $signals ]; do
  seen=$signals
  wait $worker
  code=$?
done
# 0: done; 1 and 2: the input is refused; 130 and 143: stopped; others: the machine failed.
again=
case $code in
  0 | 1 | 2) ;;
  130 | 143) again=yes ;;
  *) [ ${SLURM_RESTART_COUNT:-0} -lt 10 ] && again=yes ;;
esac
# Back to the queue, unless scancel or a pre-emption ends this job.
if [ -n "$again" ] && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $code
END0
)
report=${report%%;*}
echo "report $report"
