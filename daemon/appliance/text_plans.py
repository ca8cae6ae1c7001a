"""Plans for texts once they are token ids: the session's own inputs in the place of the text input."""

from typing import TYPE_CHECKING, Final

from appliance.call import Call, Plan
from appliance.manifest import TextSection
from appliance.planner import make_plan
from appliance.text import Tokens

if TYPE_CHECKING:
    from appliance.instance import Instance

#: Plans kept; all are dropped when there are more.
_MAX_KEPT: Final = 256


class TextPlans:
    """The plans of one instance's tokenised texts, kept while shapes repeat."""

    def __init__(self, instance: "Instance") -> None:
        self._instance = instance
        self._kept: dict[tuple[object, ...], Plan] = {}

    def give(self, call: Call, place: int, tokens: Tokens, section: TextSection) -> None:
        """Put `tokens` in the place of the texts, which are input `place` of `call`, and their plan in its plan's.

        Raises:
            InvalidRequest: The session does not take what the tokenizer gave.
        """
        plan = call.plan
        made = [(section.ids, tokens.ids), *([(section.mask, tokens.mask)] if section.mask else [])]
        key = (plan.signature, plan.outputs, plan.rows, tokens.length)
        known = self._kept.get(key)
        if known is None:
            known = self._plan(plan, [name for name, _ in made], tokens.length)
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[key] = known
        rest = [content for other, content in enumerate(call.contents) if other != place]
        if call.region_views:
            views = [view for other, view in enumerate(call.region_views) if other != place]
            call.region_views = [*(None for _ in made), *views]
        call.plan = known
        call.contents = [*(content for _, content in made), *rest]
        call.nbytes = sum(len(content) for content in call.contents)
        call.tokenise_ns = tokens.took_ns

    def _plan(self, plan: Plan, made: list[str], length: int) -> Plan:
        signature = self._instance.signature
        rows = (plan.rows,) if signature.max_batch_size else ()
        names = {index: name for name, (index, _) in signature.inputs.items()}
        others = [
            (names[tensor.place], tensor.datatype, (*rows, *tensor.row_shape))
            for tensor in plan.tensors
            if tensor.place >= 0
        ]
        heads = [*((name, "INT64", (*rows, length)) for name in made), *others]
        outputs = [signature.output_names[index] for index in plan.outputs]
        return make_plan(self._instance, signature, heads, outputs)
