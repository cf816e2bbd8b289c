# Made by `make docs`. Do not edit.
# bash completion for dpud: source it, or put it into a folder that bash-completion reads.

_dpud_offer() {
    # kind words...: offer words, files (f), folders (d), both (b) or commands (c) that begin like the current word
    local kind=$1 reply
    shift
    case $kind in
        f | b) while IFS= read -r reply; do COMPREPLY+=("$reply"); done < <(compgen -f -- "$cur") ;;
        d) while IFS= read -r reply; do COMPREPLY+=("$reply"); done < <(compgen -d -- "$cur") ;;
        c) while IFS= read -r reply; do COMPREPLY+=("$reply"); done < <(compgen -c -- "$cur") ;;
    esac
    [[ $kind == [fbd] ]] && compopt -o filenames 2>/dev/null
    while IFS= read -r reply; do COMPREPLY+=("$reply"); done < <(compgen -W "$*" -- "$cur")
    return 0
}

_dpud() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} command='' i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ -z $command && ${COMP_WORDS[i]} != -* ]]; then
            command=${COMP_WORDS[i]}
        elif [[ -n $command && ${COMP_WORDS[i]} == -- ]]; then
            if ((i == COMP_CWORD - 1)); then _dpud_offer c; else _dpud_offer f; fi
            return
        fi
    done
    if [[ -z $command ]]; then
        _dpud_offer w bench config demo diag dpu-path exec journal record reload replay report run scenarios shell snapshot status stress top --help --version
        return
    fi
    case $command in
        bench)
            case $prev in
                --write) _dpud_offer b; return ;;
                --seed) _dpud_offer w; return ;;
                --ops) _dpud_offer w; return ;;
                --inputs) _dpud_offer w; return ;;
                --target) _dpud_offer w; return ;;
                --trace) _dpud_offer b; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --write --seed --ops --inputs --target --trace --help
                return
            fi
            _dpud_offer d region node compaction fuse import pages tables breakeven engines fidelity replay terabyte gpu storm hostile service soak journal kills fuzz
            ;;
        config)
            case $prev in
                --config) _dpud_offer b; return ;;
                --scenario) _dpud_offer b cma-camera gpu-inference thp-database web-server; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --config --scenario --comments --help
                return
            fi
            _dpud_offer w --config --scenario --comments --help
            ;;
        demo)
            if [[ $cur == -* ]]; then
                _dpud_offer w --help
                return
            fi
            _dpud_offer w capture process compression defrag fault migration numa overcommit performance qos swap unified all
            ;;
        diag)
            case $prev in
                --mount) _dpud_offer d; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --mount --help
                return
            fi
            _dpud_offer w --mount --help
            ;;
        dpu-path)
            if [[ $cur == -* ]]; then
                _dpud_offer w --help
                return
            fi
            _dpud_offer w --help
            ;;
        exec)
            case $prev in
                --mount) _dpud_offer d; return ;;
                --config) _dpud_offer b; return ;;
                --scenario) _dpud_offer b cma-camera gpu-inference thp-database web-server; return ;;
                --from) _dpud_offer d host; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --mount --config --scenario --from --help
                return
            fi
            _dpud_offer c
            ;;
        journal)
            if [[ $cur == -* ]]; then
                _dpud_offer w --help
                return
            fi
            _dpud_offer w --help
            ;;
        record)
            case $prev in
                --seconds) _dpud_offer w; return ;;
                --buffer) _dpud_offer w; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --seconds --buffer --help
                return
            fi
            _dpud_offer d
            ;;
        reload)
            case $prev in
                --mount) _dpud_offer d; return ;;
                --config) _dpud_offer b; return ;;
                --scenario) _dpud_offer b cma-camera gpu-inference thp-database web-server; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --mount --config --scenario --help
                return
            fi
            _dpud_offer w --mount --config --scenario --help
            ;;
        replay)
            case $prev in
                --from) _dpud_offer d; return ;;
                --after) _dpud_offer d; return ;;
                --compact-at) _dpud_offer w; return ;;
                --proactiveness) _dpud_offer w; return ;;
                --json) _dpud_offer b; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --from --after --traditional --dpu --compact-at --proactiveness --json --help
                return
            fi
            _dpud_offer b
            ;;
        report)
            case $prev in
                --mount) _dpud_offer d; return ;;
                --config) _dpud_offer b; return ;;
                --scenario) _dpud_offer b cma-camera gpu-inference thp-database web-server; return ;;
                --from) _dpud_offer d host; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --mount --compact --config --scenario --from --help
                return
            fi
            _dpud_offer b
            ;;
        run)
            case $prev in
                --mount) _dpud_offer d; return ;;
                --config) _dpud_offer b; return ;;
                --scenario) _dpud_offer b cma-camera gpu-inference thp-database web-server; return ;;
                --from) _dpud_offer d host; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --mount --config --scenario --from --recover --help
                return
            fi
            _dpud_offer w --mount --config --scenario --from --recover --help
            ;;
        scenarios)
            if [[ $cur == -* ]]; then
                _dpud_offer w --help
                return
            fi
            _dpud_offer w --help
            ;;
        shell)
            case $prev in
                --mount) _dpud_offer d; return ;;
                --config) _dpud_offer b; return ;;
                --scenario) _dpud_offer b cma-camera gpu-inference thp-database web-server; return ;;
                --from) _dpud_offer d host; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --mount --config --scenario --from --help
                return
            fi
            _dpud_offer w --mount --config --scenario --from --help
            ;;
        snapshot)
            case $prev in
                --fragment) _dpud_offer w random runs fork pinned files; return ;;
                --mb) _dpud_offer w; return ;;
                --keep) _dpud_offer w; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --compact --fragment --mb --keep --as-is --help
                return
            fi
            _dpud_offer d
            ;;
        status)
            case $prev in
                --mount) _dpud_offer d; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --mount --json --help
                return
            fi
            _dpud_offer w --mount --json --help
            ;;
        stress)
            case $prev in
                --threads) _dpud_offer w; return ;;
                --duration) _dpud_offer w; return ;;
                --size) _dpud_offer w; return ;;
                --device) _dpud_offer w; return ;;
                --seed) _dpud_offer w; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --threads --duration --size --device --no-compression --no-swap --seed --help
                return
            fi
            _dpud_offer w --threads --duration --size --device --no-compression --no-swap --seed --help
            ;;
        top)
            case $prev in
                --mount) _dpud_offer d; return ;;
                --interval) _dpud_offer w; return ;;
            esac
            if [[ $cur == -* ]]; then
                _dpud_offer w --mount --once --interval --help
                return
            fi
            _dpud_offer w --mount --once --interval --help
            ;;
    esac
}

complete -F _dpud dpud
