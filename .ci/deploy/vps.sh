# The part that run, ways and attack share, sourced by them: boots a fresh VPS, takes README.md's steps 1 and 2, build and copy, on it,
# and ends it when the script ends.
set -euo pipefail
repo=$(realpath "${1:-$(dirname "$0")/../..}")
doc=$(realpath "${README:-$repo/README.md}")
vps=$(realpath -m "${VPS_TOOL:-$repo/../shared/vps/vps}")
here=$(realpath "$(dirname "$0")")
domain=yourdomain.com
daemon=http://127.0.0.1:3101

if ! [ -x "$vps" ] || [ "$(id -u)" != 0 ]; then
    echo "${0##*/}: skipped: it needs root, and $vps to boot a VPS with"
    exit
fi

step() { printf '\n== %3d s  %s\n' $SECONDS "$*"; }
fail() { echo "${0##*/}: FAILED: $*" >&2; exit 1; }
# wait_for WHAT COMMAND… runs the command until it succeeds, for 10 s.
wait_for() {
    for _ in $(seq 100); do
        if "${@:2}" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    fail "not within 10 s: $1"
}
is() { [ "$1" = "$2" ] || fail "$3: $1, want $2"; }
systemctl() { "$vps" run systemctl "$@"; }
# journal prints the unit's log since the last call of `mark`.
journal() { "$vps" run journalctl --unit socketio --no-pager --quiet --output cat ${cursor:+--after-cursor="$cursor"} "$@"; }
mark() { cursor=$("$vps" run journalctl --lines 1 --show-cursor | sed -n 's/^-- cursor: //p'); }

# block prints one of the README's blocks, the fence after <!-- deploy:NAME -->.
block() {
    awk -v mark="<!-- deploy:$1 -->" '$0 == mark {at = 1; next} at == 1 && /^```/ {at = 2; next} at == 2 && /^```/ {exit} at == 2' "$doc" >"$tmp/block"
    [ -s "$tmp/block" ] || fail "$doc has no block deploy:$1"
    cat "$tmp/block"
}
# readme pastes blocks into a root shell on the VPS, which shows each line as it takes it, and stops at one that fails.
readme() {
    { echo "cd; DOMAIN=$domain; export CURL_CA_BUNDLE=/etc/letsencrypt/live/$domain/fullchain.pem; set -euo pipefail; set -v"; for name; do block "$name"; done; } |
        "$vps" run bash 2>&1
}
# told SYMPTOM LINE COMMAND… waits for the line in what the command prints, and wants it in the README.
told() {
    grep -qF -- "$2" "$doc" || fail "$1: the README does not say to look for: $2"
    for _ in $(seq 60); do
        "${@:3}" >"$tmp/told" 2>&1 || true
        if grep -F -- "$2" "$tmp/told" >"$tmp/line"; then
            printf '%s\n    %s\n' "$1" "$(head -n 1 "$tmp/line" | tr -d '\r' | cut -c 1-160)"
            return
        fi
        sleep 0.1
    done
    tail -n 5 "$tmp/told"
    fail "$1: no such line: $2"
}
# visit is curl from outside: through nginx, by the domain. code prints only the status.
visit() { curl -sS --cacert "$certificate/fullchain.pem" --connect-to "$domain::127.0.0.1:" "$@"; }
code() { visit -o /dev/null -w '%{http_code}' "$@"; }
# codes prints how many requests got which status.
codes() { visit -o /dev/null -w '%{http_code}\n' "$@" | sort | uniq -c | xargs; }
# limited WHAT LEAST MOST COMMAND… wants that many 200, and 429 for the others.
limited() {
    local got passed
    got=$("${@:4}")
    passed=$(sed -nE 's/^([0-9]+) 200 [0-9]+ 429$/\1/p' <<<"$got")
    [ -n "$passed" ] && [ "$passed" -ge "$2" ] && [ "$passed" -le "$3" ] || fail "$1: $got, want $2 to $3 times 200, then 429"
    echo "$1: $got"
}
# post is Laravel's POST; poststatus prints only the status, for a secret.
secret() { sed -n 's/^SOCKETIO_SECRET=//p' "$root/etc/socketio.env"; }
post() { curl -sS -H "Authorization: Bearer $(secret)" "$@" $daemon/broadcast; }
poststatus() { curl -sS -o /dev/null -w '%{http_code}' -H "Authorization: Bearer $1" -d '{"channel": "admin-chat", "event": "e"}' $daemon/broadcast; }

# certify makes a certificate, self-signed here.
certify() {
    mkdir -p "$certificate"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/CN=$domain" -addext "subjectAltName=DNS:$domain" \
        -keyout "$certificate/privkey.pem" -out "$certificate/fullchain.pem" 2>/dev/null
}
# chat runs a test of official clients that come through nginx.
chat() {
    (cd "$here" && npm install --no-fund --no-audit --no-package-lock --loglevel error)
    DEPLOY_VPS=$vps DEPLOY_DOMAIN=$domain DEPLOY_DAEMON=$daemon DEPLOY_SECRET=$(secret) DEPLOY_CERTIFICATE=$certificate/fullchain.pem \
        node --test --test-reporter=spec "${@:2}" "$here/$1"
}

tmp=$(mktemp -d)
root=$("$vps" root)
certificate=$root/etc/letsencrypt/live/$domain
handshake="https://$domain/socket.io/?EIO=4&transport"
cursor=
finish() {
    status=$?
    if [ $status != 0 ]; then
        echo '== the end of the journal and of the nginx log' >&2
        cursor=
        journal --lines 40 >&2 || true
        tail -n 20 "$root/var/log/nginx/error.log" >&2 || true
    fi
    "$vps" stop
    rm -rf "$tmp"
    exit $status
}

step 'a fresh VPS'
command -v debootstrap >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap >/dev/null; }
"$vps" stop
trap finish EXIT
"$vps" create
for _ in $(seq 60); do
    held=$(ss -Hltnp '( sport = :80 or sport = :443 or sport = :3001 or sport = :3101 )')
    [ -n "$held" ] || break
    sleep 1
done
[ -z "$held" ] || fail "a port is taken: $held"
# The folder may have been through an earlier run.
[ -e "$root/etc/nginx/nginx.conf.dist" ] || cp "$root/etc/nginx/nginx.conf" "$root/etc/nginx/nginx.conf.dist"
cp "$root/etc/nginx/nginx.conf.dist" "$root/etc/nginx/nginx.conf"
rm -rf "$root"/etc/{socketio*.env,letsencrypt,nginx/{conf.d,snippets}/{socketio,shop}.conf,nginx/sites-{available,enabled}/site,supervisor/conf.d/socketio.conf} \
    "$root"/etc/systemd/system/{,multi-user.target.wants/}{socketio{,@*},nginx}.service* \
    "$root"/usr/local/bin/socketio* "$root"/root/{socketio,socketio.service,nginx.conf} "$root"/var/log/{journal,socketio.log}
: >"$root/var/log/nginx/error.log"
echo "127.0.0.1 localhost $domain" >"$root/etc/hosts"
# Where root may not raise the limit (a container without CAP_SYS_RESOURCE), worker_rlimit_nofile fails, and nginx would have systemd's 1,024.
mkdir -p "$root/etc/systemd/system/nginx.service.d"
printf '[Service]\nLimitNOFILE=%s\n' "$(ulimit -Hn)" >"$root/etc/systemd/system/nginx.service.d/files.conf"
"$vps" start

step 'README 1, 2: build, copy'
# In a copy, which keeps the work tree clean; scp and ssh are stand-ins, since this VPS is a folder.
mkdir "$tmp/repo"
cp "$repo"/{main.go,go.mod,go.sum,socketio.service,nginx.conf} "$tmp/repo"
ln -s "$repo/.git" "$tmp/repo/.git"
(
    cd "$tmp/repo"
    scp() { cp "${@:1:$#-1}" "$root/root/"; }
    ssh() { :; }
    block build; eval "$(block build)"
    block copy; eval "$(block copy)"
)
! ldd "$root/root/socketio" >/dev/null 2>&1 || fail 'the binary is not static'
