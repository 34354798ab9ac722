# A registry for the time of a build: `serve STORAGE` sets REGISTRY and stops it at exit.
# shellcheck shell=bash

serve() {
    local storage=$1 port config
    config=$(mktemp)
    for _ in 1 2 3 4 5; do
        port=$((20000 + RANDOM % 20000))
        cat >"$config" <<YAML
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $storage}, delete: {enabled: true}}
http: {addr: "127.0.0.1:$port", secret: testbed}
YAML
        docker-registry serve "$config" >"$config.log" 2>&1 &
        REGISTRY_PID=$!
        for _ in $(seq 100); do
            kill -0 "$REGISTRY_PID" 2>/dev/null || break
            if curl -fs "http://127.0.0.1:$port/v2/" >/dev/null; then
                # shellcheck disable=SC2034 # the result
                REGISTRY=127.0.0.1:$port
                # shellcheck disable=SC2064 # now, not then
                trap "kill $REGISTRY_PID; rm -f $config $config.log" EXIT
                return
            fi
            sleep 0.1
        done
        kill "$REGISTRY_PID" 2>/dev/null || true
    done
    cat "$config.log" >&2
    echo "no registry would start" >&2
    return 1
}
