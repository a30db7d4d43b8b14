#!/usr/bin/env bash
# A cluster on one machine: N hosts as network namespaces ep0 … with names and addresses (10.77.0.1 …) of their own, on a
# bridge whose ports are shaped in both directions. Needs root and iproute2.
#
#   cluster.sh up N RATE [BURST]     like: up 4 1gbit; RATE none leaves the ports as fast as the machine
#   cluster.sh on I COMMAND …        runs a command on host I
#   cluster.sh each N COMMAND …      runs it on every host, with RANK, WORLD_SIZE, MASTER_ADDR and EPSMOE_SECRET set, each on
#                                    a core of its own as far as there are as many; the output is that of host 0
#   cluster.sh cut I | mend I        takes the link of host I down, and up again
#   cluster.sh down N
set -euo pipefail

shape() {
    local port=$1 rate=$2 burst=$3
    tc qdisc replace dev "$port" root tbf rate "$rate" burst "$burst" latency 20ms
}

on() {
    local host=ep$1
    shift
    ip netns exec "$host" unshare --uts bash -c 'hostname "$0"; exec "$@"' "$host" "$@"
}

case ${1:-} in
up)
    hosts=$2 rate=${3:-none} burst=${4:-256kb}
    ip link add epbr type bridge
    ip link set epbr up
    for ((i = 0; i < hosts; i++)); do
        ip netns add ep$i
        ip link add epv$i type veth peer name eth0 netns ep$i
        ip link set epv$i master epbr up
        ip -n ep$i address add 10.77.0.$((i + 1))/24 dev eth0
        ip -n ep$i link set lo up
        ip -n ep$i link set eth0 up
        if [ "$rate" != none ]; then
            # What leaves the host, and what comes to it.
            ip netns exec ep$i tc qdisc replace dev eth0 root tbf rate "$rate" burst "$burst" latency 20ms
            shape epv$i "$rate" "$burst"
        fi
    done
    ;;
on)
    shift
    on "$@"
    ;;
each)
    hosts=$2
    shift 2
    export WORLD_SIZE=$hosts LOCAL_WORLD_SIZE=1 MASTER_ADDR=10.77.0.1
    EPSMOE_SECRET=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
    export EPSMOE_SECRET
    cores=$(nproc)
    for ((i = 1; i < hosts; i++)); do
        RANK=$i on $i taskset -c $((i % cores)) "$@" > /dev/null &
    done
    RANK=0 on 0 taskset -c 0 "$@"
    wait
    ;;
cut) ip -n ep"$2" link set eth0 down ;;
mend) ip -n ep"$2" link set eth0 up ;;
down)
    for ((i = 0; i < $2; i++)); do
        # A namespace goes when its last process has, and its port only then.
        ip link delete epv$i || true
        ip netns delete ep$i || true
    done
    ip link delete epbr
    ;;
*)
    sed -n '2,11p' "$0"
    exit 2
    ;;
esac
