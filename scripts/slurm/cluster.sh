#!/usr/bin/env bash
# A Slurm cluster on the loopback interface of one machine, for trials and tests: a controller, several nodes of one core each, and
# munge, all with files in one folder.
#
#   scripts/slurm/cluster.sh start FOLDER NODES     prints what to export so that sbatch and squeue ask this cluster
#   scripts/slurm/cluster.sh controller FOLDER      ends the controller and starts it again, as after a crash
#   scripts/slurm/cluster.sh stop FOLDER
#
# Jobs of the partition `high` pre-empt those of `low`, the default, which go back to the queue. Debian's packages: slurmctld slurmd
# munge slurm-client. Exit code 3: they are not installed.
set -euo pipefail
PATH="$PATH:/usr/sbin"
what=${1:?start, controller or stop} folder=$(realpath -m "${2:?a folder}")

tools=(munged slurmctld slurmd sbatch)
for tool in "${tools[@]}"; do
  command -v "$tool" >/dev/null || { echo "error: \`$tool\` is not installed

hint: apt-get install slurmctld slurmd munge slurm-client" >&2; exit 3; }
done

fail() {
  printf 'error: %s\n' "$1" >&2
  tail -n 5 "$folder"/*.log >&2 || true
  exit 1
}

# Wait until a command succeeds, for 30 s.
await() {
  local what=$1
  shift
  for _ in $(seq 150); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
  fail "$what within 30 s"
}

controller() {
  slurmctld -f "$SLURM_CONF"
  await "the controller does not answer" scontrol ping
}

end() {
  local file=$1 id
  [ -s "$file" ] || return 0
  id=$(cat "$file")
  # Its number may have become another program's.
  case "$(cat "/proc/$id/comm" 2>/dev/null)" in
    slurmctld|slurmd|munged) kill "$2" "$id" 2>/dev/null || return 0 ;;
    *) return 0 ;;
  esac
  for _ in $(seq 100); do kill -0 "$id" 2>/dev/null || return 0; sleep 0.1; done
  kill -9 "$id" 2>/dev/null || true
}

export SLURM_CONF="$folder/slurm.conf"
case "$what" in
  start)
    nodes=${3:?the number of nodes}
    mkdir -p "$folder/state"
    # Free ports one after the other: the controller's, then each node's.
    first=$(python3 - "$((nodes + 1))" <<'PORTS'
import random, socket, sys
for _ in range(100):
    first = random.randrange(20000, 30000)
    try:
        held = [socket.create_server(("127.0.0.1", first + i)) for i in range(int(sys.argv[1]))]
    except OSError:
        continue
    print(first)
    break
PORTS
)
    host=$(hostname -s)
    head -c 1024 /dev/urandom > "$folder/munge.key"
    chmod 400 "$folder/munge.key"
    cat > "$SLURM_CONF" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$first
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/controller.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/controller.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=60
SlurmdParameters=config_overrides
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=$((first + 1))-$((first + nodes)) CPUs=1 RealMemory=2000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE
CONF
    munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" --pid-file "$folder/munge.pid" \
      --log-file "$folder/munge.log" --seed-file "$folder/munge.seed"
    controller
    for n in $(seq "$nodes"); do slurmd -N "n$n" -f "$SLURM_CONF"; done
    all_idle() { [ "$(sinfo -h -p low -t idle -o %D)" = "$nodes" ]; }
    await "not all nodes are idle" all_idle
    echo "export SLURM_CONF=$(printf %q "$SLURM_CONF")"
    ;;
  controller)
    end "$folder/controller.pid" -9
    controller
    ;;
  stop)
    for file in "$folder"/n*.pid "$folder/controller.pid" "$folder/munge.pid"; do end "$file" -15; done
    ;;
  *) echo "error: unknown command \`$what\`" >&2; exit 1 ;;
esac
