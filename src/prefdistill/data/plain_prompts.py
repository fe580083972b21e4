"""What prompts given as plain text may lack: the marks of a chat model's template, or a space before the response."""

from __future__ import annotations

from prefdistill.data.checks import short
from prefdistill.data.table import PromptGroup
from prefdistill.data.tokenise import Encoder

SHARE = 0.5  # of the plain prompts, from which it is worth a warning


class PlainPrompts:
    """Looks at one prompt after the other and says at the end what most plain ones lack.

    A plain prompt is used as it is and its response follows with nothing in between, which is right for a base model
    and texts made for it. Where it is not, a run trains without a sign of trouble on what the model never reads in use.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._mark = encoder.user_turn_end
        self.plain = self.unmarked = self.joined = 0
        self._example = ""

    def see(self, group: PromptGroup) -> None:
        """Counts a prompt that is text; conversations are laid out by the template and pass."""
        if not isinstance(group.prompt, str):
            return
        self.plain += 1
        if self._mark not in group.prompt:
            self.unmarked += 1
        elif self._mark:
            return  # laid out by hand as the template does, which may put nothing in between
        for response in group.responses:
            if _touch(group.prompt, str(response.text)):
                self.joined += 1
                self._example = self._example or short(repr(group.prompt[-20:] + str(response.text)[:20]))
                break

    def counts(self) -> dict[str, int]:
        """For data.json."""
        return {"prompts": self.plain, "without_template": self.unmarked, "run_into_response": self.joined}

    def warnings(self) -> list[str]:
        """At most two texts, for the log; none where all is well."""
        least = max(1, SHARE * self.plain)
        found = []
        if self.unmarked >= least:
            found.append(
                f"{self.unmarked} of {self.plain} prompts are plain text and get no chat template, which this model "
                "has: give messages (role and content) if it is a chat model; for a base model this is right"
            )
        if self.joined >= least:
            found.append(
                f"{self.joined} of {self.plain} prompts run into their responses, as in {self._example}: begin the "
                "responses with a space or a line break, unless that is meant"
            )
        return found


def _touch(prompt: str, response: str) -> bool:
    """Whether two words would become one, or one begin right behind a mark; code and scripts without spaces pass."""
    last, first = prompt[-1:], response[:1]
    return bool(last) and (last + first).isascii() and (last.isalnum() or last in ".,;:?!") and first.isalnum()
