"""Wrong answers to the exercises of notebook 06, and what is said of them."""

FORWARD = """def qlora_forward(x, layer):
    packed = layer.base_layer.weight
    weight = bitsandbytes.functional.dequantize_4bit(packed, packed.quant_state)
    a = layer.lora_A["default"].weight
    b = layer.lora_B["default"].weight
    scaling = layer.scaling["default"]
    bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias
    return {}"""

LABELS = """def mask_labels(prompt_ids, answer_ids, eos):
    masked = [-100] * len(prompt_ids)
    return {}"""

WRONG = {
    1: {
        FORWARD.format("x @ weight.T + bias + x @ a.T @ b.T"): "result 1 of 4: values wrong",
        FORWARD.format(
            "x @ packed.T + bias + scaling * x @ a.T @ b.T"
        ): "a layer Linear4bit it raises RuntimeError: mat1 and mat2 shapes",
        FORWARD.format(
            "x @ weight.T + bias + scaling * x.detach() @ a.T @ b.T"
        ): "result 2 of 4: values wrong",
        FORWARD.format(
            "x @ weight.T + bias + scaling * x @ a.T.detach() @ b.T"
        ): "result 3 of 4: a tensor is needed, yours is of type NoneType",
        FORWARD.format(
            "(x @ weight.T + bias + scaling * x @ a.T @ b.T).detach()"
        ): "RuntimeError: element 0 of tensors does not require grad",
        FORWARD.format(
            "x @ weight.T + layer.base_layer.bias + scaling * x @ a.T @ b.T"
        ): "TypeError: unsupported operand type(s) for +: 'Tensor' and 'NoneType'",
        FORWARD.format("x @ weight.T + scaling * x @ a.T @ b.T"): "result 1 of 4: values wrong",
    },
    2: {
        LABELS.format("prompt_ids + answer_ids, masked + answer_ids"): (
            "result 1 of 2: shape wrong: yours is (7,), needed is (8,)"
        ),
        LABELS.format("prompt_ids + answer_ids + [eos], masked + answer_ids + [-100]"): (
            "position 7: -100 is too small. Hint: the end token must train too, or the model never"
        ),
        LABELS.format("prompt_ids + answer_ids + [eos], prompt_ids + answer_ids + [eos]"): (
            "result 2 of 2: values wrong at position 0: 11 is too large"
        ),
        LABELS.format(
            "prompt_ids + answer_ids + [eos], masked[1:] + answer_ids + [eos, -100]"
        ): "position 4: 21 is too large. Hint: do not move the labels by one: transformers does",
        LABELS.format("masked + answer_ids + [eos]"): "2 results are needed",
        """def mask_labels(prompt_ids, answer_ids, eos):
    answer_ids.append(eos)
    return prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids""": (
            "it changes what it is given"
        ),
    },
}
