#compdef <BIN>
# Completion of <BIN>; made by `<BIN> completions zsh`.
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_complete_proxykv_train() {
    # Only what is before the cursor counts.
    local -a asked=("${(@Q)words[1,CURRENT-1]}" "${(Q)PREFIX}") open done
    local line
    for line in "${(@f)$(PROXYKV_TRAIN_WORD=$((CURRENT - 1)) <VARIABLE>=zsh \
        <COMPLETER> -- "${asked[@]}" 2>/dev/null)}"; do
        # No blank after a folder or a key. The value ends at the first colon that is not escaped.
        case "${${line//\\:/}%%:*}" in
            '') ;;
            */|*=) open+=("$line") ;;
            *) done+=("$line") ;;
        esac
    done
    (( $#open )) && _describe -V 'values' open -S ''
    (( $#done )) && _describe -V 'values' done
    (( $#open + $#done ))
}
compdef _complete_proxykv_train <BIN>
