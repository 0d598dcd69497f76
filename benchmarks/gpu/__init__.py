"""`make gpu`: tests and benchmark on a machine with an NVIDIA GPU and no network, into one folder.

environment.py  a virtual environment without downloads, and what the machine is
live.py         pytest, with results that outlive an interruption
world.py        activations and SAE, made on the device
rivals.py       dense training steps in plain PyTorch
sources.py      the files that a piece of a run depends on
record.py       which pieces are done, and what is known of a device
budget.py       the time of each part
suite.py        the tests that a GPU has to run
cases.py        what is measured, by whom, in which order
kinds.py        steps of the other kinds
goals.py        what they should reach
measure.py      the check, the clock and the CSV
bench.py        runs the cases
tune.py         other tile sizes for the kernels
sass.py         instructions of the kernels, counted in their machine code
model.py        what a step's kernels should take, beside what they took
cuts.py         what changes to them should bring
predict.py      the goals by the model
"""
