# The part that run, ways and attack share, sourced by them: boots a fresh Debian (debian, beside this), takes README.md's steps 1
# and 2, build and copy, on it, and ends it when the script ends.
set -euo pipefail
repo=$(realpath "${1:-$(dirname "$0")/../..}")
doc=$(realpath "${README:-$repo/README.md}")
here=$(realpath "$(dirname "$0")")
domain=yourdomain.com
chat=$domain            # where the chat is; other than the site's address with 6b on a subdomain
daemon=http://127.0.0.1:3101

step() { printf '\n== %3d s  %s\n' $SECONDS "$*"; }
fail() { echo "${0##*/}: FAILED: $*" >&2; exit 1; }

# The rest runs in a network of its own, where no port is taken and nothing can be fetched: so it is fetched before.
if [ "${SOCKETIO_NETWORK:-}" != own ]; then
    step 'what has to be fetched'
    "$here/debian" base
    (cd "$repo" && go mod download)
    (cd "$here" && npm install --no-fund --no-audit --no-package-lock --loglevel error)
    SOCKETIO_NETWORK=own exec unshare --net "$0" "$@"
fi
ip link set lo up

# wait_for WHAT COMMAND… runs the command until it succeeds, for 10 s.
wait_for() {
    for _ in $(seq 100); do
        if "${@:2}" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    fail "not within 10 s: $1"
}
is() { [ "$1" = "$2" ] || fail "$3: $1, want $2"; }
on() { "$here/debian" in "$vps" "$@"; }
systemctl() { on systemctl "$@"; }
reboot() {
    "$here/debian" off "$vps"
    "$here/debian" boot "$vps"
}
# journal prints the unit's log since the last call of `mark`.
journal() { on journalctl --unit socketio --no-pager --quiet --output cat ${cursor:+--after-cursor="$cursor"} "$@"; }
mark() { cursor=$(on journalctl --lines 1 --show-cursor | sed -n 's/^-- cursor: //p'); }

# block prints one of the README's blocks, the fence after <!-- deploy:NAME -->, with the addresses that somebody would type in.
block() {
    awk -v mark="<!-- deploy:$1 -->" '$0 == mark {at = 1; next} at == 1 && /^```/ {at = 2; next} at == 2 && /^```/ {exit} at == 2' "$doc" >"$tmp/block"
    [ -s "$tmp/block" ] || fail "$doc has no block deploy:$1"
    sed -E "s/^CHAT=\S+/CHAT=$chat/" "$tmp/block"
}
# paste has a root shell on the VPS take blocks as they come in by its standard input: it shows each line, and stops at one that fails.
paste() { { echo "cd; SITE=$domain CHAT=$chat; export CURL_CA_BUNDLE=/etc/letsencrypt/live/$domain/fullchain.pem; set -euo pipefail; set -v"; cat; } | on bash 2>&1; }
readme() { for name; do block "$name"; done | paste; }
# checked makes the README's checks.
checked() {
    readme check upgrade-test | tee "$tmp/check"
    for answer in '^0{' '^0$' '"delivered":0' '^101$'; do
        grep -q "$answer" "$tmp/check" || fail "the README's checks do not show $answer"
    done
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
visit() { curl -sS --cacert "$certificate/fullchain.pem" --connect-to "$domain::127.0.0.1:" --connect-to "chat.$domain::127.0.0.1:" "$@"; }
code() { visit -o /dev/null -w '%{http_code}' "$@"; }
# codes prints how many requests got which status. Not by HTTP/2, where curl gives a request up that meets nginx's farewell to a
# connection, after 1,000 requests.
codes() { visit --http1.1 -o /dev/null -w '%{http_code}\n' "$@" | sort | uniq -c | xargs; }
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
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/CN=$domain" \
        -addext "subjectAltName=DNS:$domain,DNS:chat.$domain" -keyout "$certificate/privkey.pem" -out "$certificate/fullchain.pem" 2>/dev/null
    ln -sfn $domain "$root/etc/letsencrypt/live/chat.$domain"
}
# clients runs tests of official clients that come through nginx.
clients() {
    DEPLOY_VPS=$vps DEPLOY_DOMAIN=$domain DEPLOY_DAEMON=$daemon DEPLOY_SECRET=$(secret) DEPLOY_CERTIFICATE=$certificate/fullchain.pem \
        node --test --test-reporter=spec "${@:2}" "$here/$1"
}

tmp=$(mktemp -d)
vps=$(mktemp -d /var/tmp/socketio-ci.XXXXXX)
root=$vps/root
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
    "$here/debian" off "$vps"
    rm -rf "$tmp" "$vps"
    exit $status
}
trap finish EXIT

step 'a fresh VPS'
"$here/debian" boot "$vps"
echo "127.0.0.1 localhost $domain chat.$domain" >"$root/etc/hosts"
# Where root may not raise the limit (a container without CAP_SYS_RESOURCE), worker_rlimit_nofile fails, and nginx would have systemd's 1,024.
mkdir -p "$root/etc/systemd/system/nginx.service.d"
printf '[Service]\nLimitNOFILE=%s\n' "$(ulimit -Hn)" >"$root/etc/systemd/system/nginx.service.d/files.conf"
systemctl daemon-reload

# build takes README's steps 1 and 2, in a copy, which keeps the work tree clean; scp and ssh are stand-ins, since this VPS is a folder.
build() (
    mkdir -p "$tmp/repo"
    cp "$repo"/{main.go,go.mod,go.sum,socketio.service,nginx.conf} "$tmp/repo"
    ln -sfn "$repo/.git" "$tmp/repo/.git"
    cd "$tmp/repo"
    scp() { cp "${@:1:$#-1}" "$root/root/"; }
    ssh() { :; }
    block build; eval "$(block build)"
    block copy; eval "$(block copy)"
)
step 'README 1, 2: build, copy'
build
! ldd "$root/root/socketio" >/dev/null 2>&1 || fail 'the binary is not static'
