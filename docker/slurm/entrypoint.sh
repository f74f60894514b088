#!/usr/bin/env bash
# Be one machine of a Slurm cluster to rehearse on: write slurm.conf, start munged and the daemon of the role, and end both
# when either ends or this is told to.
#
#   entrypoint.sh controller|node
#
# The defaults are those of compose.slurm.yaml, where every machine is a container. Several machines on one host have a
# CLUSTER_LOCAL and a port each. Nothing in /etc is read or written.
set -euo pipefail

role=${1:-}
: "${CLUSTER_SHARED:=/runs/.cluster}"             # the key and the controller's state; all machines have it
: "${CLUSTER_LOCAL:=/tmp/cluster}"                # configuration, sockets and spool of this machine alone
: "${CLUSTER_CONTROLLER:=controller}"             # its host name
: "${CLUSTER_CONTROLLER_ADDRESS:=$CLUSTER_CONTROLLER}"
: "${CLUSTER_CONTROLLER_PORT:=6817}"
: "${CLUSTER_NODES:=n1 n2}"                       # NAME or NAME=ADDRESS:PORT of each
: "${CLUSTER_NODE:=$(hostname -s)}"               # which of them this is
: "${CLUSTER_CPUS:=4}"                            # of each node
: "${CLUSTER_MEMORY:=4000}"                       # of each node, in MB
: "${CLUSTER_PATIENCE:=60}"                       # seconds to wait for other machines
export SLURM_CONF=${SLURM_CONF:-$CLUSTER_LOCAL/slurm.conf}

template=$(dirname "$0")/slurm.conf.template
key=$CLUSTER_SHARED/munge.key
state=$CLUSTER_SHARED/state
munge=$CLUSTER_LOCAL/munge
socket=$munge/socket

fail() {
    echo "entrypoint.sh: $1" >&2
    exit 1
}

address_of() { # NAME or NAME=ADDRESS:PORT
    local place=${1#*=}
    echo "${place%%:*}"
}

node_lines() {
    local node port
    for node in $CLUSTER_NODES; do
        port=6818
        [[ $node == *:* ]] && port=${node##*:}
        echo "NodeName=${node%%=*} NodeAddr=$(address_of "$node") Port=$port CPUs=$CLUSTER_CPUS" \
            "RealMemory=$CLUSTER_MEMORY State=UNKNOWN"
    done
}

write_configuration() {
    local text name user
    text=$(<"$template")
    user=$(id -un) || fail "user $(id -u) has no name here, and Slurm wants one"
    declare -A values=(
        [user]=$user
        [controller]=$CLUSTER_CONTROLLER
        [controller_address]=$CLUSTER_CONTROLLER_ADDRESS
        [controller_port]=$CLUSTER_CONTROLLER_PORT
        [socket]=$socket
        [state]=$state
        [local]=$CLUSTER_LOCAL
        [nodes]=$(node_lines)
    )
    for name in "${!values[@]}"; do
        text=${text//"@$name@"/"${values[$name]}"}
    done
    echo "$text" >"$SLURM_CONF"
}

wait_for() { # WHAT COMMAND...
    local what=$1 deadline=$((SECONDS + CLUSTER_PATIENCE))
    shift
    until "$@" >/dev/null; do
        [ "$SECONDS" -lt "$deadline" ] || fail "no $what after $CLUSTER_PATIENCE s (CLUSTER_PATIENCE)"
        sleep 0.1
    done
}

make_key() {
    if [ ! -e "$key" ]; then
        # Under another name first: a node that waits for the key must not read half of it.
        (umask 077 && head --bytes=1024 /dev/urandom >"$key.new")
        mv "$key.new" "$key"
    fi
}

start_munged() {
    mkdir -p "$munge"
    # A machine that was killed leaves its socket behind, which munged takes for another munged.
    rm -f "$socket" "$socket.lock"
    munged --foreground --key-file="$key" --socket="$socket" --pid-file="$munge/pid" \
        --seed-file="$munge/seed" &
    munged=$!
    until [ -S "$socket" ]; do
        kill -0 "$munged" 2>/dev/null || fail "munged ended, and said why above"
        sleep 0.1
    done
}

end() { # PROCESS
    if [ -n "$1" ] && kill -TERM "$1" 2>/dev/null; then
        # slurmd and slurmctld ask a munged that has ended again and again.
        timeout 10 tail --pid="$1" --sleep-interval=0.1 --follow /dev/null || kill -KILL "$1"
        wait "$1" || true
    fi
}

stop() {
    # The daemon first: what it still has to say needs munged.
    end "${daemon:-}"
    end "${munged:-}"
}

trap stop EXIT
trap 'exit 0' TERM INT

case $role in
controller)
    mkdir -p "$state" "$CLUSTER_LOCAL"
    make_key
    for node in $CLUSTER_NODES; do
        # slurmctld looks addresses up once, and a container has one from its start.
        wait_for "address of $node" getent hosts "$(address_of "$node")"
    done
    command=(slurmctld -D -f "$SLURM_CONF")
    ;;
node)
    mkdir -p "$CLUSTER_LOCAL/spool" "$CLUSTER_LOCAL/tmp"
    wait_for "key of the controller in $key" test -e "$key"
    command=(slurmd -D -N "$CLUSTER_NODE" -f "$SLURM_CONF")
    ;;
*) fail "the role is '$role', and must be controller or node" ;;
esac

write_configuration
start_munged
"${command[@]}" &
daemon=$!
wait -n
