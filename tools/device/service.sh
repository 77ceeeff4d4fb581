#!/bin/sh
# Makes a systemd service of the server: on this machine alone (127.0.0.1), as a user of its own,
# without rights, within a limit of memory, started again when it fails. For Debian, Raspberry Pi OS
# and JetPack; Termux has no systemd.
#
#   sudo tools/device/service.sh MODEL [--port N] [--memory SIZE] [--name NAME] [--print]
#
#   MODEL     a .gguf file that other users may read: /opt/coreinfer-edge/models is a good place
#   --port    default 8080
#   --memory  the most that the model may have; default: what is available
#   --name    of the service; default coreinfer-edge
#   --print   print the unit, and install nothing; needs no root
#
# Its settings are those of settings.sh. Options of your own: systemctl edit NAME.
set -eu

say() { printf '%s\n' "$*" >&2; }
refuse() {
    say "service.sh: $*"
    exit 1
}
first_line='# Written by tools/device/service.sh'

model='' port=8080 memory=auto name=coreinfer-edge print=''
while [ $# -gt 0 ]; do
    case $1 in
        --port | --memory | --name)
            [ $# -gt 1 ] || refuse "$1 needs a value"
            case $1 in
                --port) port=$2 ;;
                --memory) memory=$2 ;;
                --name) name=$2 ;;
            esac
            shift
            ;;
        --print) print=yes ;;
        -h | --help)
            sed -n '2,/^set -eu/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
            exit 0
            ;;
        -*) refuse "unknown option $1: see --help" ;;
        *)
            [ -z "$model" ] || refuse "one model: $model or $1"
            model=$1
            ;;
    esac
    shift
done
[ -n "$model" ] || refuse "name a model: a .gguf file"
[ -f "$model" ] || refuse "$model: there is no such file"
case $port in *[!0-9]* | '' | ??????*) refuse "--port $port is no port" ;; esac
if [ "$port" -lt 1 ] || [ "$port" -gt 65535 ]; then
    refuse "--port $port is no port: they go from 1 to 65535"
fi
case $name in *[!A-Za-z0-9_-]* | '') refuse "--name $name: letters, digits, - and _" ;; esac
model=$(cd "$(dirname "$model")" && pwd)/$(basename "$model")
case $model in *[!A-Za-z0-9/._+-]*) refuse "$model: systemd wants a path without spaces and signs" ;; esac

unit=/etc/systemd/system/$name.service
if [ -z "$print" ]; then
    [ "$(id -u)" = 0 ] || refuse "it installs $unit, and needs root: sudo, or --print"
    command -v systemctl >/dev/null || refuse "there is no systemd here: see --print"
    if [ -e "$unit" ] && [ "$(head -n 1 "$unit")" != "$first_line" ]; then
        refuse "$unit is there already, and not of this script: give another --name"
    fi
fi

command=${COREINFER_EDGE:-coreinfer-edge}
command=$(command -v "$command" || true)
[ -n "$command" ] || refuse "there is no coreinfer-edge here: run install.sh, or set COREINFER_EDGE"
command=$(readlink -f "$command")
# The service's user is nobody that this system knows: it sees what everybody may read.
# A virtual environment can have its Python from a home folder (uv, pyenv).
python=$(readlink -f "$(dirname "$command")/python" || true)
for path in "$command" "$python"; do
    case $path in /home/* | /root/*) refuse "$path is in a home folder, which the service may not
read: install with sudo tools/device/install.sh --to /opt/coreinfer-edge, and PYTHON of the system" ;; esac
done
case $model in /home/* | /root/*) refuse "$model is in a home folder, which the service may not read:
copy it to /opt/coreinfer-edge/models" ;; esac
if [ -z "$print" ] && command -v setpriv >/dev/null; then
    for path in "$model" "$command"; do
        setpriv --reuid 65534 --regid 65534 --clear-groups test -r "$path" ||
            refuse "other users may not read $path: chmod o+r it, and o+x its folders"
    done
fi

settings=$(COREINFER_EDGE=$command "$(dirname "$0")/settings.sh" "$model" --memory "$memory") || exit 1
THREADS='' CONTEXT='' MEMORY='' GPUS=0 GPU_MEMORY='' MEMORY_MAX=''
eval "$settings" # numbers of our own script
options="--threads $THREADS --ctx $CONTEXT"
[ -z "$MEMORY" ] || options="$options --memory $MEMORY"
[ -z "$GPU_MEMORY" ] || options="$options --gpu-memory $GPU_MEMORY"

new=$(mktemp)
trap 'rm -f "$new"' EXIT
cat >"$new" <<END
$first_line
[Unit]
Description=CoreInfer Edge, a language model at http://127.0.0.1:$port
After=network.target
StartLimitIntervalSec=300
StartLimitBurst=5

[Service]
ExecStart=$command serve $model --host 127.0.0.1 --port $port $options
Restart=on-failure
RestartSec=5
# It ends the answer under way first, which --grace limits to 30 s.
TimeoutStopSec=45
SuccessExitStatus=143

DynamicUser=yes
CacheDirectory=$name
Environment=HOME=%C/$name XDG_CACHE_HOME=%C/$name HF_HUB_OFFLINE=1
UMask=0077

MemoryMax=$MEMORY_MAX
MemorySwapMax=0
OOMPolicy=stop
Nice=5
TasksMax=256

NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
# no UNIX sockets: it logs to standard error
RestrictAddressFamilies=AF_INET AF_INET6
IPAddressDeny=any
IPAddressAllow=localhost
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
END
# A GPU is a device. Before systemd 253 ProtectClock denies all devices but the clock.
if [ "$GPUS" = 0 ]; then
    printf 'PrivateDevices=yes\nProtectClock=yes\n' >>"$new"
else
    say "service.sh: there is a GPU; its devices are left to the service (PrivateDevices is off)"
    groups=''
    for group in video render; do
        ! getent group "$group" >/dev/null || groups="$groups $group"
    done
    [ -z "$groups" ] || printf 'SupplementaryGroups=%s\n' "${groups# }" >>"$new"
fi
printf '\n[Install]\nWantedBy=multi-user.target\n' >>"$new"

if [ -n "$print" ]; then
    cat "$new"
    exit 0
fi
if [ -e "$unit" ] && cmp -s "$new" "$unit"; then
    say "service.sh: $unit is up to date"
else
    install -m 644 "$new" "$unit"
    say "service.sh: wrote $unit"
fi
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl enable "$name"
    systemctl restart "$name"
    say "service.sh: started. journalctl -u $name shows its log; curl http://127.0.0.1:$port/health"
else
    say "service.sh: systemd does not run here (a container?): systemctl enable --now $name, once it does"
fi
