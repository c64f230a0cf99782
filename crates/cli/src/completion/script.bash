# Completion of <BIN>; made by `<BIN> completions bash`.
_complete_proxykv_train() {
    local words=("${COMP_WORDS[@]}")
    # Only what is before the cursor counts. `=` and `:` are words of their own, and stay.
    [[ "${words[COMP_CWORD]}" == [=:]* ]] || words[COMP_CWORD]=$2
    mapfile -t COMPREPLY < <(PROXYKV_TRAIN_WORD=$COMP_CWORD <VARIABLE>=bash \
        <COMPLETER> -- "${words[@]}" 2>/dev/null)
    # No blank after a folder or a key, nor where there is a choice.
    [[ "${#COMPREPLY[@]}" -eq 1 && "${COMPREPLY[0]}" != *[/=:] ]] && compopt +o nospace
    return 0
}
complete -o nospace -o nosort -F _complete_proxykv_train <BIN>
