"""The dial, and what a model, a method and a length cost: bytes, floating-point operations, seconds. Closed forms, no weights.

dial.py           declared context, configuration and free memory -> method and parameters, with the reason
sizing.py         plan(): cost by method, the bound, the nearest request that can be met
architecture.py   a model on the meta device -> exact weight bytes
work.py           a layout -> pairs attended, keys read, what stays visible
memory.py         a layout -> bytes of the store, temporary bytes, what fits
theory.py         the published cost models: peak performance (arXiv 2405.08944), SpeContext's thresholds (arXiv 2512.00722)
hardware.py       what a device is, and the cards of the datasheets
devices.py        a name -> a card, this machine as it was measured, or a TOML file
calibration.py    this machine, measured
timing.py         seconds, from work and measured or assumed speeds
machine.py        memory, processor and cache folder of this machine
profile.py        what `longreach tune` found for a model: its file, and which entry serves a context
terms.py          the published terms and thresholds for a request
"""
