"""Print completion of commands, settings and options for the shell: `eval "$(lora-lab completion bash)"`."""

import argparse
from collections.abc import Sequence

from lora_lab.commands import COMMANDS, RUN

_BASH = """\
eval "$(lora-lab -sc install=bash)"
_lora_lab() {
    local word=${COMP_WORDS[COMP_CWORD]} first=${COMP_WORDS[1]}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "COMMANDS" -- "$word"))
        [ ${#COMPREPLY[@]} -eq 1 ] && COMPREPLY=("${COMPREPLY[0]} ")
        [ -n "$word" ] && [ ${#COMPREPLY[@]} -gt 0 ] && return
        local commands=("${COMPREPLY[@]}")
        hydra_bash_completion
        COMPREPLY=("${commands[@]}" "${COMPREPLY[@]}")
    elif [ "$first" = RUN ]; then
        COMP_LINE="${COMP_WORDS[0]} ${COMP_LINE#* RUN }" COMP_CWORD=$((COMP_CWORD - 1)) hydra_bash_completion
    elif [[ " COMMANDS " == *" $first "* ]]; then
        case $word in
            -*) COMPREPLY=($(compgen -S " " -W "$(lora-lab "$first" --help | grep -oE -- '--[a-z-]+' | sort -u)" \\
                    -- "$word")) ;;
        esac
    else
        hydra_bash_completion
    fi
}
complete -o nospace -o default -F _lora_lab lora-lab
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="lora-lab completion", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shell", choices=["bash"])
    parser.parse_args(arguments)
    print(_BASH.replace("COMMANDS", " ".join([RUN, *COMMANDS])).replace("RUN", RUN), end="")
    return 0
