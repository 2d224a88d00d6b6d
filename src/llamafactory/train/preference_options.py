"""Options that several preference stages share; each stage's own `Options` extends them."""

from __future__ import annotations

from llamafactory.hparams.section import Section, option

GROUP = "Preference optimisation"


class PreferenceOptions(Section):
    """How far the policy may move from its reference, and what that is."""

    pref_beta: float = option(0.1, "Strength of the preference against the reference.", group=GROUP, gt=0)
    pref_ftx: float = option(
        0.0, "Weight of a supervised loss on preferred answers, in nats per token.", group=GROUP, ge=0
    )
    ref_model: str | None = option(
        None, "Reference model; null takes the model as it is before training.", group=GROUP
    )
    ref_model_adapters: tuple[str, ...] = option((), "Adapters that are merged into ref_model.", group=GROUP)
    ref_model_quantization_bit: int | None = option(
        None, "Bits of a weight of ref_model, 4 or 8, by bitsandbytes; null loads it as it is.", group=GROUP
    )
    cache_reference: bool | None = option(
        None,
        "Compute the reference's log-probabilities once and keep them; null does where there is more than one epoch.",
        group=GROUP,
    )
