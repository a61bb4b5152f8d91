"""A recurrent layer's loop over time, step after step: a phone's graph has no loops."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

Step = Callable[[Any, Sequence[Any]], tuple[Any, Sequence[Any]]]


def recurrence(
    step_function: Step,
    inputs: Any,
    initial_states: Sequence[Any],
    go_backwards: bool = False,
    mask: Any = None,
    constants: Sequence[Any] | None = None,
    unroll: bool = False,
    input_length: int | None = None,
    time_major: bool = False,
    zero_output_for_mask: bool = False,
    return_all_outputs: bool = True,
) -> tuple[Any, Any, Any]:
    """What Keras' `backend.rnn` computes: LSTM, GRU and SimpleRNN, layers of one's own cells, and stacks of them.

    Args:
        step_function: (entries of one step, states) -> (output, new states): the cell.
        inputs: (B,T,...), or a structure of such, T static.
        initial_states: of the cell.
        go_backwards: from the last step to the first; the outputs stand in the order of computation.
        mask: (B,T), the steps that count; where one does not, states stay and the output is the one before.
        constants: what the cell takes behind its states at each step.
        unroll: the graph is unrolled always; Keras then does not look at `zero_output_for_mask`.
        input_length: of no effect: no step is added behind the last one.
        time_major: inputs, mask and outputs are (T,B,...).
        zero_output_for_mask: the output of a step that does not count is zero.
        return_all_outputs: whether the outputs of all steps are wanted, or the last one only.

    Returns:
        The last output (B,...), all outputs (B,T,...) or the last one (B,1,...), and the last states.
    """
    axis = 0 if time_major else 1
    at = lambda x, i: x[i] if time_major else x[:, i]
    length = keras.tree.flatten(inputs)[0].shape[axis]
    zeros = zero_output_for_mask and not unroll
    states, before, outputs = initial_states, None, []
    for i in reversed(range(length)) if go_backwards else range(length):
        step = keras.tree.map_structure(lambda x, i=i: at(x, i), inputs)
        output, new = step_function(step, [*states, *(constants or ())])
        if mask is not None:
            counts = at(mask, i)
            output = _where(counts, output, 0.0 if before is None or zeros else before)
            pairs = zip(keras.tree.flatten(new), keras.tree.flatten(states), strict=True)
            new = keras.tree.pack_sequence_as(new, [_where(counts, x, old) for x, old in pairs])
        states, before = new, output
        outputs = [*outputs, output] if return_all_outputs else [output]
    return outputs[-1], ops.stack(outputs, axis=axis), states


def _where(counts: Any, x: Any, otherwise: Any) -> Any:
    """Rows of x where a step counts (B,), and of the other one where it does not."""
    return ops.where(ops.reshape(counts, (-1,) + (1,) * (len(x.shape) - 1)), x, otherwise)
