"""What is said about a run beside its numbers, by the name of its file."""

NOTES = {
    "xeon-amx": """### What the targets that are missed come to

The targets come from a processor of another make, on which a half-precision product takes twice as long. Here the
frozen linear is that much faster, and the narrow products of any adapter, which are bound by memory and by packing,
weigh more: plain LoRA itself misses 4, 5 and 12. The machine is a shared one, and its other load cannot be seen from
inside: equal code (`ours` and `ours:joined` in a step; the paths of 7) differs by a tenth and more in places.

- **2.** In float32 a step costs nine tenths of plain LoRA's; the intervals of the joined and the fused path stay below
  1, that of `ours`, which is the joined one, does not. In half precision `ours` reads 1.07 and the very same code
  under the name `ours:joined` 0.96, so it costs what plain LoRA costs; that it costs less is not shown.
- **3.** Half a percent: the routing weights, one number per token and expert, must be kept for the backward, and
  plain LoRA has none. With the balance loss the probabilities are kept too.
- **4, 5.** What brought the layer here from the plain operations: nothing as large as the input or the output is made
  beside the frozen linear's own; the large product is added to the narrow one instead of the other way round, forward
  and backward; the router's rows ride in the products of A where the dtype allows; the rounding error of
  half-precision logits comes from a second product instead of a float32 copy of the input; the two best experts are
  found by two maxima instead of a sort; softmax runs along tokens. In a smaller layer (d 1024, half precision) the
  router's second product and some fifteen small operations over tokens and experts show. `[W|B]` as one matrix
  was no faster than adding onto the narrow product in a probe of which no result file is kept, and doubles the frozen
  weights, so it was not built.
- **7.** `ours` runs one of the two paths that it is compared with, so a difference whose interval reaches below 1, as
  that of the worst cell, is noise. One cell is not: d 512, 256 tokens, 512 rank rows in float32, 1.16. The rule is
  cautious with so few tokens.
- **8.** The pair draws masks for every row and moves the selection vectors; on so small a model that shows.
- **9.** Three passes, the virtual step of the optimiser and its Jacobian.
- **10.** A search is worth a number of training steps that does not depend on the task; from how many rows on it is a
  quarter of the second stage stands at the end of this section.
- **12.** For one token the adapter is bound by calls, not by arithmetic: seven operations where plain LoRA has four,
  and from 13 operations (`ours:packed`) on nothing was won in time: narrow half-precision products for one token take
  several times as long as float32 ones, so widened copies are made, and these cost what the calls had. Keeping the
  copies would be faster; they would be stale without notice when somebody writes through `.data`, so this was not
  done.
- **13.** Three tensors per linear instead of two, and 6 % more parameters, the routers'.
- `torch.set_float32_matmul_precision("medium")` computes in half precision on this processor (a relative error of
  3e-3); `model.matmul_precision` of recipes measures that and refuses it.
""",
    "h200": """### What these numbers come to

Two kinds of time are here. Called from Python one operation after the other, a layer on this fast card waits for the
host: the frozen linear of 8192 tokens takes 0.35 ms, and a mixture's calls take longer than that on the virtual
machine it was measured on. Replayed as a CUDA graph, only the kernels count ("kernels alone"); that is what 16 is
about. Compiled models and larger ones were not timed there.

- **16.** Kernels alone, a mixture of 8 experts costs less than plain LoRA of the same rank does through PEFT. The
  targets were predicted from the card's full bandwidth; narrow products reach about 70 % of it here
  (`benchmarks/results/speed/parts/h200.json`): 27 µs for one pass over x and 28 over dy, 24 and 29 for the two weight
  gradients, 24 and 30 for the two narrow products that the large ones are added to, beside 692 for the frozen linear.
  Adding the narrow product to the large one's result instead would take 59 µs in place of 24 + 4, which is why it is
  the other way round. `[W|B]` as one matrix would take 6 µs in place of those 28, if x came with room for the gated
  activations beside it; copying x there takes 33, so it was not built: only the layer in front could spare that.
- **2, 4, 5, 12, 13** were measured by calls here, so they say what eager training of a small model on this machine
  costs, not what the card could do: a step of the 6-layer model is bound by calls even in PEFT. Eager, plain LoRA is
  faster.
- **11.** The counter sees torch's operations, not Triton's: two kernels more per linear in training, one in
  generation.
- The sorted path waits for the device and is not chosen by itself here.
- One layer could not be captured (d 2048; no variant of it), and the time on the card was over before that was looked
  into.
- torch here is 2.11; Triton's kernels were compared with the naive loop on the card (`pytest
  tests/layers/test_kernels.py`).
""",
}
