"""The text that `tutti --help` prints first."""

HELP = """
Tutti pre-trains vision-language-action robot models end to end: vision
encoder, language encoder, fusion and action decoder learn together, from one
batch, under one loss L = sum_i lambda_i L_i.

[bold]Start here[/bold]

  tutti demo     record, train, evaluate, report: 10 to 25 minutes

[bold]The same in pieces, in the usual order[/bold]

  tutti record configs/demo.yaml     the simulator's experts -> dataset/
  tutti train configs/demo.yaml      demonstrations -> checkpoints/
  tutti evaluate runs/demo           checkpoint -> success per task
  tutti report runs/demo             all of it -> report.html

[bold]What is wrong, before a training and after it[/bold]

  tutti doctor configs/demo.yaml     data, model, loss: is anything broken?
  tutti probe runs/demo              does it look, listen, or copy its state?
  tutti verify-resume configs/demo.yaml     killed, resumed: the same bits?
  tutti replay runs/demo --step 4600        one step again, to the same bits

[bold]What will it need? Memory, time, traffic, before anything runs[/bold]

  tutti plan configs/plans/3b.yaml --gpus 8 --episodes 1e7

[bold]Which way is better? At an equal budget, over seeds, with intervals[/bold]

  tutti compare configs/studies/strategies.yaml

[bold]Change anything, in the file or behind it[/bold]

  tutti train configs/demo.yaml name=short training.steps=500 \\
    'data.sources=[{path: runs/demo/dataset}]'     the demo's data again
  tutti train configs/demo.yaml name=mine 'data.sources=[{path: my/data}]'
  tutti schema > tutti.schema.json   every key, for an editor

Interrupt any command with Ctrl-C and run it again: finished work is kept.
"""
