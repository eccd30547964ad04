"""What docs/family.md says beside the numbers."""

HEAD = """# The family, compared

**On two small tasks, with few rows and short trainings, no method is better than plain LoRA on both.** On SST-2
six of the 21 others have a better loss beyond noise (uniform experts, GuiLoMo, LD-MoLE, AdaMoLE, SSR, MixLoRA);
in accuracy none is better. On docstrings FlyLoRA has a better accuracy, AdaMoLE and LoRA-Mixer a worse loss.
Over both tasks the methods' ranks do not differ beyond noise. Which allocation a mixture has does not matter
here: the uniform one leads by more than the searched one, and random plans are as often right as the search's.
A step costs about what LoRA's costs for most of them, and about a third more for MixLoRA.

**Ready-made adapters of other tasks were no better than training, and mostly worse.** With a small decoder on
ScienceQA, all five rows that start from six of them have a worse loss than plain LoRA, Rocket too, which trains
its adapters on. On novels the four chosen by perplexity cannot be told from LoRA at a fifth of its trained
parameters, and the rest is worse. X-LoRA takes three steps' time for one. FlexMoRE's experts, cut out of models
that were trained in full on other texts, are as good as LoRA on novels from rank 16 of 64 on, with nothing but
routers trained, and far behind on ScienceQA.

**Over four kinds of text trained as one, mixtures are better than plain LoRA at the same budget.** With the same
decoder LoRAMoE and uniform experts have a better loss beyond noise. Reading which text a block is of is not what
does it: LoRAMoE does as well without it; MOELoRA, which chooses its experts by nothing else, has the lowest mean
perplexity of all (24.5, LoRA 26.1), but its seeds differ too much to tell it from LoRA; and LoRA-Mixer's hard
stage costs the more the longer it is.

Made by `python -m benchmarks.family_page` from the files in `benchmarks/results/comparisons`; the comparisons
are in `benchmarks/comparisons`, and how they are made fair is in [compare.md](compare.md). Bold in a table:
beyond noise, after correction for all tests of the comparison. Intervals of single methods hold the choice of
test rows, which all methods share, and the luck of training, so that they overlap more than differences do.
"""

BEFORE = {  # in the order of the page
    "family-minilm": """\
All 22 methods that need no bank, 240 training rows per task, 30 steps each. What SST-2 shows is likely the
speed of learning, not what can be learned: LoRA goes astray there at a rate of 3e-3, at which most mixtures do
best. With 900 rows LoRA has an accuracy of 80.5 there, and mixtures have 79.8 to 81.0
([results.md](results.md)). The first result had three rates; where the best lay at their edge others won or
lost, so the grid was widened to six for all methods, and what had another rate then was trained again. FlyLoRA,
whose scale is divided by the number of its experts as published, would still go higher.""",
    "options-stories": """\
A decoder of 260,000 parameters that was trained on children's stories, and questions with options, scored by
likelihood per character. The bank rows start from six adapters of rank 2 (`bank.yaml`: MRPC, CoLA, RTE, film
reviews, WikiText, Shakespeare). ScienceQA is above guessing. SST-2 as a question is not learned from 900 rows.
Two rates, 3e-2 and 1e-1, were added after the first result, in which the bank rows had chosen the upper edge:
they gained little by it, and MeteoRA alone would still go higher.""",
    "novels-stories": """\
The same decoder and the same six adapters, on novels, which none of them was trained on. Choosing four of the
adapters by perplexity is much better than drawing four, as choosing should be, and so near to plain LoRA that
it cannot be told from it, with a fifth of the trained parameters and adapters that were there anyway; X-LoRA
and MeteoRA over all six are worse. The rates 3e-2 and 1e-1 were added after the first result, in which all rows
but LoRA's had chosen the upper edge.""",
    "flexmore-stories": """\
Three models were trained in full from the same decoder, their feed-forwards alone, on film reviews, WikiText and
Shakespeare (`python -m benchmarks.full_experts`); low-rank experts were extracted from them, and routers of 1,280
parameters trained over them and the base. On novels quality grows with the rank, as it should, and from rank 16
of 64 on it cannot be told from LoRA, which trains 45 times as many parameters. On ScienceQA, which is like none of
the texts, routers alone are far behind. With experts of rank 4 trained on, it cannot be told from LoRA on either
task. What the full models had cost to train is in no column. Effective ranks are 52 to 60 of 64 here, so that
little is saved by them.""",
    "mixed-stories": """\
Novels, film reviews, encyclopedia and plays, 225 blocks of each, trained as one task whose rows know their part
(`task.parts`, [methods.md](methods.md#tasks-of-rows)). All methods choose the rate 1e-2, within the grid. The
mixtures' lead is largest on novels and reviews. LoRA-Mixer gives a row to its own expert alone in the hard stage,
with weight 1, and shares the weight among all of them in the soft one: after so few steps the second has not
made up for the change. Its published ratio is of 40,000 rows and then 2,000 to 4,000.""",
    "mixed-minilm": """\
The encoder with a joint head of both tasks' classes, 60 steps in all: it learns which task a row is of, and not
more. That is the chance that is meant here, and no row is above it, though as many rows of each task were enough
for each alone (family-minilm). MOELoRA has a better loss than LoRA there all the same, LoRA-Mixer a worse
one.""",
    "chance-stories": """\
Two more tasks of questions with options, with the three rows that suffice to see that nothing is learned.""",
}

GLUE = """## MRPC, CoLA and RTE

From the result files of the shipped recipes ([results.md](results.md)): the encoder is not above naming the
most frequent class on any of the three with so many rows, so they have no part in the comparison above.
"""

AFTER = """## The page

![The top of the page that `guilomo compare` writes for family-minilm](family/page.png)

`guilomo compare` writes one beside its compare.json; `write_comparison` ([compare.md](compare.md)) makes those of the
result files here.

## What this does not show

- Models are small and trainings short, as two CPU cores allow. In family-minilm a method made for many tasks at once
  (task gates, hybrid routers, LoRA-Mixer's hard stage) meets one, where its gate is a learned constant; in the mixed
  comparisons it meets two and four, where papers have more.
- Coefficients are those of the papers where they are known, and are not tuned; only the learning rate is.
- One seed chooses the rate. Where the best rate lies near the edge of stability, the other seeds may pay for it.
"""
