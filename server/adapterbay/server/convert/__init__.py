"""From PEFT's tensors to serving forms.

`tree` shows PEFT the base, `read` has it build its layers there, `layers` turns those into one formula; `lora`,
`tables`, `virtual` and `attention` read what needs no PEFT. `methods` is the table of all of them.
"""
