"""Bad input ends every command with one line and exit status 2, and changes no file.

The programs run as `python NAME` runs them, but in this process and from the folder of the files.
"""

import json
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace

from show import run_program

import numpy
import pytest
import torch
from conftest import words_tokenizer
from tiny_runs import ROOT, SHAPE, command, make_place, run, write_lines
from tokenizers import Tokenizer

import adapters
import recurse
from checkpoints import load_tokenizer
from data import train_tokenizer
from model import LM

TRAIN = "train.py --model lm/model --train train.jsonl --dev dev.jsonl --out new --steps 1"
TRAIN += " --device cpu --connector-layers 1 --prompt-length 4 --max-new-tokens 4 --method"
TEXT = f"--train text.jsonl --dev text.jsonl --out new --steps 1 --device cpu {SHAPE}"
SHORT = {
    "TRAIN": TRAIN,
    "RECUR": f"{TRAIN} neural_recursion",
    "PROMPT": f"{TRAIN} prompt_tuning",
    "TEXTUAL": f"{TRAIN} textual_recursion --candidates 2",
    "LM": f"pretrain.py lm {TEXT} --context 96 --vocab-size 300",
    "LONE": f"pretrain.py lm --out new --steps 1 --device cpu {SHAPE} --context 96",
    "BERT": f"pretrain.py bert {TEXT} --context 32 --model lm/model",
    "CONNECTOR": f"pretrain.py connector {TEXT[: TEXT.index(' --dim')]} --model lm/model",
}

# Command line | words that its one line contains. The words in capitals are those of SHORT.
TABLE = r"""
train.py --steps 1                                      | --method
train.py --meth prompt_tuning                           | --meth
TRAIN magic                                             | magic | neural_recursion
RECUR --colour red                                      | --colour
RECUR --steps 0                                         | --steps
RECUR --lr -1                                           | --lr
RECUR --lr nan                                          | --lr
RECUR --lr 1e300                                        | --lr: 1e300 is not between 0 and
RECUR --threads 100000                                  | --threads: 100000 is not between 1 and
RECUR --steps 99999999999999999999                      | --steps | between 1 and 2147483647
RECUR --connector-layers 100000                         | --connector-layers | 1 and 10000
RECUR --passes 100000                                   | --passes | between 2 and 10000
TRAIN id_pt --encoder-prompt 1000000000000              | --encoder-prompt | 1 and 10000
TRAIN deep_prompt --reparam-dim 1000000000000           | --reparam-dim | is not between 1 and
RECUR --device cuda                                     | --device cuda
RECUR --attention fused                                 | --attention fused needs --device cuda
RECUR --model nowhere/at/all                            | nowhere
RECUR --train none.jsonl                                | none.jsonl | no such file
RECUR --train .                                         | --train .: | no file TASK-train.jsonl
RECUR --train broken.jsonl                              | broken.jsonl:2
RECUR --train long.jsonl                                | long.jsonl:2 | context
RECUR --dev long.jsonl                                  | long.jsonl:2 | context
RECUR --train doubled.jsonl                             | doubled.jsonl:1: | 'c' occurs twice
RECUR --dev unanswered.jsonl                            | unanswered.jsonl:1 | answer
RECUR --tokenizer large                                 | large/tokenizer.json | another LM
RECUR --tokenizer small                                 | --tokenizer | belongs to another LM
RECUR --init foreign                                    | another base
RECUR --init connector --connector-layers 2             | --connector-layers 1
RECUR --init three --connector-layers 1                 | --passes 3 --connectors each
RECUR --init three --passes 3 --connectors shared       | --passes 3 --connectors each
RECUR --passes 1                                        | --passes
RECUR --cache-first-pass -1                             | --cache-first-pass
RECUR --pause -1                                        | --pause
RECUR --pause 2 --pause-text ''                         | --pause 2 | --pause-text
RECUR --pause 60                                        | :1: | context
RECUR --stages-from run                                 | --stages-from run: neural_recursion has
TEXTUAL --stages-from run                               | --stages-from run: holds no finished p1
TEXTUAL --stages-from stages --lr 0.5                   | p1 was started with --lr | not 0.5
TEXTUAL --stages-from stages --seed 1                   | p1 was started with --seed 0, not 1
TEXTUAL --stages-from stages --train dev.jsonl          | --stages-from: stages/p1 | on other data
TEXTUAL --stages-from stages --model replaced           | stages/p1 | on another LM
PROMPT --passes 3                                       | --passes 3 | neural_recursion
TRAIN training_free --init connector                    | --init | training_free
RECUR --init vocab                                      | --init vocab | neural_recursion
RECUR --init text:words                                 | --init text:words | neural_recursion
RECUR --init nothing                                    | --init nothing
RECUR --init ''                                         | --init: an empty text
PROMPT --init=                                          | --init: an empty text
RECUR --model ''                                        | --model: an empty text
RECUR --tokenizer ''                                    | --tokenizer: an empty text
RECUR --train ''                                        | --train: an empty text
TRAIN id_pt --encoder ''                                | --encoder: an empty text
transfer.py source --train train.jsonl '' --out new     | --train: an empty text
eval.py mixed --prompts '' --input dev.jsonl            | --prompts: an empty text
eval.py mixed --prompts =mine --input dev.jsonl         | --prompts =mine: a name or a folder
eval.py mixed --prompts mine= --input dev.jsonl         | --prompts mine=: a name or a folder
eval.py templates ''                                    | argument run: an empty text
PROMPT --init text:                                     | --init 'text:'
RECUR --eval-limit 0                                    | --eval-limit | 0 is not a number from 1 up
RECUR --eval-tokens 0                                   | --eval-tokens
RECUR --out run                                         | run exists | --resume
RECUR --out run --resume --lr 0.5                       | --lr | 0.5
RECUR --out run --resume --init random                  | --init
RECUR --out run --resume --train dev.jsonl              | other data
RECUR --out run --resume --model replaced               | another LM
RECUR --model lm-retokenised --out retokenised --resume | retokenised was | another tokenizer
RECUR --model lm-ended --out ended --resume             | ended was started with other end tokens
RECUR --out thesis --resume                             | thesis is not a run's folder
RECUR --out train.jsonl                                 | --out train.jsonl: is not a folder
RECUR --out /dev/full --resume                          | --out /dev/full: is not a folder
RECUR --out run --resume --stop .                       | --stop
RECUR --train unknown.jsonl --model word | unknown.jsonl:2: | 'w5 town'
RECUR --train words.jsonl --dev unknown.jsonl --model word | unknown.jsonl:2: | 'w5 town'
RECUR --train words.jsonl --dev words.jsonl --test unknown.jsonl --model word | unknown.jsonl:2:
RECUR --train special.jsonl                             | special.jsonl:1: | x<|endoftext|>y
RECUR --dev lines.jsonl                                 | lines.jsonl:1: | holds '\n' | --stop
RECUR --test dev.jsonl --stop n                         | dev.jsonl:2: | holds 'n' | --stop
RECUR --train disagree.jsonl                            | :1: the target 'b' is not among the ans
RECUR --seed -1                                         | --seed | -1
RECUR --out torn --resume                               | state.safetensors | corrupt
RECUR --out spoilt --resume                             | run.json | not a run record
PROMPT --prompt-length 90                               | train.jsonl:1 | context
PROMPT --checkpoint-activations --compile               | --checkpoint-activations: | --compile
PROMPT --beta2 1                                        | --beta2: 1 is not between 0 and 0.999999
PROMPT --prompt-length 600                              | --prompt-length 600 | context
PROMPT --init connector                                 | Connector | prompt_tuning
PROMPT --init prompt                                    | --prompt-length 90
PROMPT --init vocab:0                                   | --init vocab:0
PROMPT --init vocab:four                                | --init vocab:four
PROMPT --dev twice.jsonl                                | twice.jsonl:3
PROMPT --train half.jsonl                               | half.jsonl:1
PROMPT --out twice.jsonl/new                            | twice.jsonl
PROMPT --out mine --train mine.jsonl --resume           | other data
PROMPT --out other --model replaced --resume            | another LM
TRAIN connector_lm --dev full.jsonl --max-new-tokens 70 | full.jsonl:1
TRAIN textual_recursion --candidates 0                  | --candidates
TRAIN textual_recursion --rounds 0                      | --rounds
TRAIN textual_recursion --train long.jsonl              | long.jsonl:2 | context
TRAIN lm_connector --init connector                     | for neural_recursion | lm_connector
TRAIN fine_tuning --init connector                      | --init | fine_tuning

pretrain.py                                             | objective
pretrain.py poem                                        | poem
LM --init connector                                     | --init
LM --vocab-size 256                                     | --vocab-size
LM --heads 5                                            | --heads 5
LM --dim 6                                              | --dim 6
LM --seq-len 97                                         | --seq-len 97 | can read
LM --train little.jsonl                                 | too few for one window of
LM --dev little.jsonl                                   | held-out text | too few
LONE --train little.jsonl                               | one document | --dev
LM --context 99999999999999999999                       | --context | is not between 8 and
LM --train latin.txt                                    | latin.txt:1: not UTF-8 text
LM --train blank.txt                                    | blank.txt: holds no text
BERT --seq-len 31                                       | --seq-len 31 | can read
BERT --seq-len 1                                        | --seq-len
CONNECTOR --seq-len 97                                  | --seq-len 97 | can read
CONNECTOR --composition magic                           | magic
CONNECTOR --composition lm_connector --passes 3         | --passes 3 | neural_recursion
pretrain.py prompt --model lm/model --prompt-length 95  | --prompt-length 95 | context of 96

bench.py --only everything                              | everything
bench.py --runs 0                                       | --runs
bench.py plan                                           | --method
bench.py plan --method neural_recursion --seq-len 0     | --seq-len
bench.py plan --method fine_tuning --model nowhere      | nowhere
bench.py plan --method fine_tuning --train long.jsonl --model lm/model | long.jsonl:2 | context

transfer.py                                             | command
transfer.py search --task run                           | --library
transfer.py search --library nowhere --task prompt      | nowhere: no such folder
transfer.py search --library thesis --task prompt       | thesis: holds no folder of a prompt
transfer.py search --library . --task connector         | connector: not a prompt
transfer.py source --train none.jsonl --out new         | none.jsonl: no such file
transfer.py source --train blank.txt --out new          | blank.txt: holds no text
transfer.py source --train train.jsonl --out new --steps 9 | --keep-at 100 exceeds --steps 9
transfer.py source --train train.jsonl --out run        | run exists | --resume
transfer.py continue --train train.jsonl --variant maml | maml | fomaml
transfer.py continue --train train.jsonl --out new      | train.jsonl: 8 examples | --batch-size 32
transfer.py continue --train thesis --out new           | --train thesis: holds no file TASK-train
transfer.py few-shot --train train.jsonl --out new      | --test

data.py                                                 | path
data.py broken.jsonl --unknown                          | --unknown
data.py broken.jsonl                                    | broken.jsonl:2: | not a line of JSON
data.py list.jsonl                                      | list.jsonl:1: a JSON object is expected
data.py empty.jsonl                                     | empty.jsonl: holds no examples
data.py none.jsonl                                      | none.jsonl: no such file
data.py thesis                                          | is a folder, not a file
data.py twice.jsonl                                     | :3: the id 1 is taken by twice.jsonl:1
data.py choices.jsonl                                   | :1: | 'yes' is not among the options no
data.py doubled.jsonl                                   | :1: the option 'c' occurs twice
data.py holes.jsonl                                     | holes.jsonl:1: needs a text under the key
data.py dev.jsonl --tokenizer thesis                    | thesis

eval.py                                                 | command
eval.py contrast                                        | contrast
eval.py compare x                                       | run_b
eval.py compare run nowhere                             | nowhere/predictions.jsonl: no such file
eval.py compare run fewer | 5 in run, | 4 in fewer, and 4 are | id 'q4' of task 'b' is in run but
eval.py compare run run --iters 0                       | --iters | 0 is not a number from 1 up
eval.py compare run run --seed -1                       | --seed | -1 is not between 0 and
eval.py ask --run run --seed -1 who                     | --seed | -1 is not between 0 and
eval.py score dev.jsonl --seed 9223372036854775808      | --seed | is not between 0 and
eval.py score dev.jsonl --seed x                        | --seed | invalid int value: 'x'
eval.py score dev.jsonl --out train.jsonl               | --out train.jsonl: is not a folder
eval.py score dev.jsonl --out /dev/full                 | --out /dev/full: is not a folder
eval.py score lines.jsonl                               | lines.jsonl:1: | holds '\n' | --stop
eval.py mixed --prompts mine --input lines.jsonl --out mixed | lines.jsonl:1: | holds '\n' | --stop
eval.py score dev.jsonl --rank-by most                  | --rank-by | 'most'
eval.py score dev.jsonl --stop o                        | dev.jsonl:1: | holds 'o' | --stop
eval.py score special.jsonl                             | special.jsonl:1: | x<|endoftext|>y
eval.py score dev.jsonl --shots 1 --shots-from special.jsonl | special.jsonl:1: | x<|endoftext|>y
eval.py score alias.jsonl                               | :1: the answer 'B' is not among the opt
eval.py ask --run retokenised who                       | retokenised: | another tokenizer
eval.py score dev.jsonl --run retokenised               | retokenised: | another tokenizer
eval.py ask --run own who                               | own: | another tokenizer
eval.py ask --run run                                   | no question
eval.py ask --run run ' '                               | no question, or an empty one
eval.py ask --run nowhere who                           | nowhere: no run.json
eval.py ask --run run --input none.txt                  | No such file | none.txt
eval.py score broken.jsonl                              | broken.jsonl:2:
eval.py score dev.jsonl --model nowhere                 | nowhere
eval.py ask --run run --input latin.txt                 | latin.txt: not UTF-8 text
eval.py ask --run run --input list.jsonl                | list.jsonl:1: a JSON object is expected
eval.py ask --run run --model replaced who              | another LM than replaced | --model
eval.py score dev.jsonl --run nowhere                   | nowhere: no run.json
eval.py score dev.jsonl --run run --model replaced      | another LM than replaced | --model
eval.py score unanswered.jsonl                          | unanswered.jsonl:1 | eval.py ask --input
eval.py score doubled.jsonl                             | doubled.jsonl:1: | 'c' occurs twice
eval.py score long.jsonl --model lm/model               | long.jsonl:2 | context
eval.py score dev.jsonl --limit 0                       | --limit | 0 is not a number from 1 up
eval.py score dev.jsonl --eval-tokens 0                 | --eval-tokens
eval.py score dev.jsonl --max-new-tokens 0              | --max-new-tokens
eval.py score dev.jsonl --shots 0                       | --shots | from 1 up
eval.py score dev.jsonl --shots 2                       | --shots and --shots-from need each other
eval.py score dev.jsonl --shots-from dev.jsonl          | --shots and --shots-from need each other
eval.py score dev.jsonl --shots 1 --shots-from none.jsonl | none.jsonl: no such file
eval.py score dev.jsonl --model lm/model --shots 2 --shots-from long.jsonl | dev.jsonl:1 | context
eval.py score dev.jsonl --shots 9 --shots-from dev.jsonl | 0 examples that are not asked, fewer
eval.py score dev.jsonl --out run                       | run/predictions.jsonl exists | --out
eval.py score dev.jsonl --out /dev/null/x               | Not a directory | /dev/null/x
eval.py score dev.jsonl --model lm/model --threshold 0  | neural_recursion
eval.py ask --run run --threshold nan who               | --threshold
eval.py explain                                         | run
eval.py explain nowhere                                 | nowhere: no adapter_config.json
eval.py explain run                                     | run: neural_recursion trains more than a
eval.py explain mine --top 0                            | --top | 0 is not a number from 1 up
eval.py explain mine --model replaced                   | another LM than replaced | --model
eval.py templates                                       | run
eval.py templates nowhere                               | nowhere/predictions.jsonl: no such file

audit.py                                                | command
audit.py hard run                                       | --out
audit.py hard run --out new --seed -1                   | --seed | -1 is not between 0 and
audit.py passes retokenised --out new                   | retokenised: | another tokenizer
audit.py hard run --out thesis                          | thesis exists
audit.py hard mine --out new --samples 0                | --samples
audit.py hard run --out new --runs fewer nowhere        | nowhere/predictions.jsonl: no such file
audit.py passes nowhere --out new                       | nowhere: no run.json
audit.py passes run --out thesis                        | thesis exists
audit.py passes mine --out new                          | neural_recursion
audit.py passes run --out new --runs fewer              | fewer: was not tested on id 'q4'
audit.py bridge run --out new                           | predictions.jsonl:1: is no question of
audit.py bridge run --out new --limit 0                 | --limit

runs.py                                                 | command
runs.py verify nowhere                                  | nowhere: no run.json
runs.py verify unfinished                               | unfinished: is not finished | --resume
runs.py verify spoilt                                   | run.json | not a run record
generate.py lm/model                                    | text
generate.py nowhere text                                | nowhere
generate.py lm/model text --max-new-tokens 0            | max_new_tokens cannot be 0
generate.py lm/model text --max-new-tokens 96           | context of 96
generate.py lm/model text --temperature -1              | temperature cannot be -1
generate.py mine text --threshold 0                     | neural_recursion
generate.py lm/model text --threshold 0                 | neural_recursion
generate.py run text --threshold nan                    | --threshold
generate.py spoilt text                                 | run.json | not a run record
generate.py lm/model text --seed -1                     | --seed | -1 is not between 0 and
generate.py lm/model text --seed 9223372036854775808    | --seed | is not between 0 and
adapters.py                                             | folder
adapters.py thesis                                      | thesis: no adapter_config.json
adapters.py cut                                         | adapter_model.safetensors
convert.py                                              | --to
convert.py nowhere new --to nq-open                     | nowhere: no such file
convert.py dev.jsonl dev.jsonl --to nq-open             | dev.jsonl exists
convert.py dev.jsonl new/dev.jsonl --to nq-open         | new
convert.py dev.jsonl new --to prompted                  | --template | --label
convert.py dev.jsonl new --to nq-open --label answer    | --template | --label
convert.py dev.jsonl new --to prompted --template Q --label question    | --template has no
convert.py dev.jsonl new --to prompted --template {no} --label question | dev.jsonl:1: {no}
convert.py dev.jsonl new --to prompted --template {question} --label no     | dev.jsonl:1: no: there
convert.py dev.jsonl new --to prompted --template {question} --label answer | dev.jsonl:1: answer:
convert.py dev.jsonl new --to prompted --template {question} --label q --choices a | --choices: 'a'
reproduce.py transfer --data nowhere                    | --data nowhere: no such folder
reproduce.py transfer --data .                          | --data .: needs a source
reproduce.py recursion --pretrained nowhere --plan      | --pretrained nowhere: no such folder
rerank.py                                               | folder
rerank.py nowhere                                       | nowhere
rerank.py lm/model                                      | config.json: model_type
t5.py                                                   | folder
t5.py nowhere                                           | nowhere
t5.py lm/model                                          | config.json: model_type
world.py --people three                                 | --people
world.py --people 3                                     | people: 3 is not between 20 and
world.py --out thesis                                   | thesis | exists and is not empty
world.py --out new --documents 0                        | documents: 0 is not at least 1
"""
ROWS = [line.split("|") for line in TABLE.splitlines() if line.strip()]
ROWS += [  # the byte ff, as Python reads it from a command line
    (line.replace("BYTE", "\udcff"), "is not UTF-8 text")
    for line in (
        "PROMPT --init text:BYTE",
        "RECUR --train BYTE.jsonl",
        "RECUR --out new/BYTE",
        "LM --train BYTE.txt",
        "bench.py plan --method fine_tuning --model BYTE",
        "bench.py --only BYTE",
        "eval.py ask BYTE",
        "eval.py ask who --stop CafBYTE",
        "generate.py lm/model 'so BYTE so'",
    )
]
ROWS += [  # a value of 5,000 letters is not shown in full
    (line.replace("LETTERS", "a" * 5000), *words)
    for line, *words in (
        ("RECUR --init LETTERS", "File name too long"),
        ("RECUR --model LETTERS", "File name too long"),
        ("RECUR --out LETTERS", "File name too long"),
        ("PROMPT --init LETTERS", "File name too long"),
        ("bench.py plan --method fine_tuning --model LETTERS", "File name too long"),
        ("eval.py score dev.jsonl --model LETTERS", "File name too long"),
        ("eval.py score dev.jsonl --out LETTERS", "File name too long"),
        ("eval.py explain LETTERS", "File name too long"),
        ("eval.py templates LETTERS", "File name too long"),
        ("eval.py ask --run run LETTERS", "eval.py ask: 'aaa", "aaa': ", "context"),
        ("train.py --method LETTERS", "--method: invalid choice: 'aaa", " ... ", "training_free"),
        ("pretrain.py LETTERS", "objective: invalid choice: 'aaa", " ... "),
        ("transfer.py LETTERS", "command: invalid choice: 'aaa", " ... "),
        ("transfer.py search --library . --task LETTERS", "File name too long"),
        ("bench.py --only LETTERS", "--only: invalid choice: 'aaa", " ... "),
        ("bench.py plan --method LETTERS", "--method: invalid choice: 'aaa", " ... "),
        ("bench.py attention --device LETTERS", "bench.py attention: ", "aaa", " ... "),
        ("audit.py LETTERS", "command: invalid choice: 'aaa", " ... "),
        ("reproduce.py LETTERS", "experiment: invalid choice: 'aaa", " ... "),
        ("runs.py LETTERS", "command: invalid choice: 'aaa", " ... "),
        ("runs.py verify LETTERS", "File name too long"),
        ("eval.py score dev.jsonl --limit LETTERS", "--limit", " ... "),
        ("data.py dev.jsonl --LETTERS", "data.py: unrecognized arguments: --aaa", " ... "),
        ("generate.py lm/model text --seed LETTERS", "generate.py: ", "--seed", " ... "),
        ("generate.py LETTERS text", "generate.py: ", "File name too long"),
        ("adapters.py thesis --LETTERS", "adapters.py: unrecognized", " ... "),
        ("adapters.py LETTERS", "adapters.py: ", "File name too long"),
        ("rerank.py lm/model --LETTERS", "rerank.py: unrecognized", " ... "),
        ("convert.py LETTERS new --to nq-open", "File name too long"),
        ("convert.py dev.jsonl new --to LETTERS", "--to: invalid choice: 'aaa", " ... "),
        ("rerank.py LETTERS", "rerank.py: ", "File name too long"),
        ("t5.py lm/model --LETTERS", "t5.py: unrecognized", " ... "),
        ("t5.py LETTERS", "t5.py: ", "File name too long"),
        ("world.py --people LETTERS", "world.py: ", "--people", " ... "),
        ("world.py --people 20 --out LETTERS", "world.py: ", "File name too long"),
    )
]
if torch.cuda.is_available():
    ROWS = [row for row in ROWS if "--device cuda" not in row[0]]

FILES = {
    "broken.jsonl": '{"question": "a", "answer": ["b"]}\n{"question": \n',
    "unanswered.jsonl": '{"question": "a", "answer": []}\n',
    "list.jsonl": "[1]\n",
    "empty.jsonl": "",
    "twice.jsonl": '{"id": 1, "question": "a", "answer": ["b"]}\n\n' * 2,
    "half.jsonl": '{"question": "\\ud83d", "answer": ["b"]}\n',
    "long.jsonl": '{"question": "a", "answer": ["b"]}\n'
    + json.dumps({"question": "why " * 200, "answer": ["b"]}),
    "full.jsonl": json.dumps({"question": "why so " * 8, "answer": ["b"]}),
    "choices.jsonl": '{"inputs_pretokenized": "a", "targets_pretokenized": "yes", '
    '"answer_choices": ["no"]}\n',
    "doubled.jsonl": '{"input": "a", "target": "b", "options": ["b", "c", " c"]}\n',
    "holes.jsonl": '{"input": null, "question": null, "target": "b"}\n',
    "little.jsonl": '{"text": "a"}\n',
    "blank.txt": "\n\n",
    "unknown.jsonl": '{"input": "w1", "target": "w5"}\n{"input": "w2", "target": "w5 town"}\n',
    "words.jsonl": '{"input": "w1", "target": "w5"}\n',
    "special.jsonl": '{"input": "who", "target": "x<|endoftext|>y"}\n',
    "lines.jsonl": '{"question": "who", "answer": ["one\\ntwo"]}\n',
    "disagree.jsonl": '{"input": "a", "target": "b", "answers": ["c"], "options": ["b", "c"]}\n',
    "alias.jsonl": '{"question": "a", "answer": ["b", "B"], "options": ["b", "c"]}\n',
    "thesis/chapter.tex": "mine",
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with broken files beside good ones, and with runs that must be left alone."""
    place = make_place(tmp_path_factory.mktemp("place"))
    for name in ("thesis", "large", "small", "fewer"):
        (place / name).mkdir()
    for name, text in FILES.items():
        (place / name).write_text(text)
    (place / "latin.txt").write_bytes(b"\xff\xfe")
    words = " ".join(f"word{i}" for i in range(400))
    for name, text, size in (("large", words, 600), ("small", "another text", 262)):
        train_tokenizer([text], size).save(str(place / name / "tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:  # the runs know their files by these names
        patch.chdir(place)
        make_runs(place)
    return place


def make_runs(place):
    def short(line):
        name, *flags = line.split()
        run(shlex.split(f"{SHORT[name]} {' '.join(flags)}"))

    for out in ("run", "torn", "spoilt"):
        short(f"RECUR --out {out}")
    run(command(place, "neural_recursion", place / "connector"))
    short("TEXTUAL --out stages")
    state = place / "torn" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    (place / "spoilt" / "run.json").write_text("{}")
    record = json.loads((place / "run" / "run.json").read_text())
    del record["results"]
    (place / "unfinished").mkdir()
    (place / "unfinished" / "run.json").write_text(json.dumps(record))
    lines = (place / "run" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (place / "fewer" / "predictions.jsonl").write_text("".join(lines[:4]))
    questions = (place / "train.jsonl").read_text().splitlines()
    write_lines(place / "mine.jsonl", map(json.loads, questions))
    short("PROMPT --out mine --train mine.jsonl")
    write_lines(place / "mine.jsonl", map(json.loads, questions[:4]))
    lm, tokenizer = LM.from_pretrained("lm/model"), load_tokenizer("lm/model")
    lm.save("replaced", tokenizer=tokenizer)
    short("PROMPT --out other --model replaced")
    other = LM(lm.config)
    other.save("replaced", tokenizer=tokenizer, replace=True)
    adapters.save_adapter("foreign", recurse.new_connector(other, "neural_recursion", 1), other)
    words = LM(replace(lm.config, vocab_size=67, eos=(2,), bos=None))
    words.save("word", tokenizer=words_tokenizer(67))
    make_changed_runs(place, lm, tokenizer)
    three = [recurse.new_connector(lm, "neural_recursion", 1) for _ in "ab"]
    adapters.save_adapter("three", adapters.Connectors(three, 3), lm)
    adapters.save_adapter("prompt", adapters.SoftPrompt(torch.zeros(90, 32)), lm)
    adapters.save_adapter("cut", adapters.SoftPrompt(torch.zeros(90, 32)), lm)
    weights = place / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def make_changed_runs(place, lm, tokenizer):
    """Runs whose LM has since got another tokenizer, or other end tokens. Weights are the same."""
    other = json.loads(tokenizer.to_str())
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = Tokenizer.from_str(json.dumps(other))
    for name in ("retokenised", "ended"):
        lm.save(f"lm-{name}", tokenizer=tokenizer)
        run(shlex.split(f"{SHORT['RECUR']} --model lm-{name} --out {name}"))
    other.save("lm-retokenised/tokenizer.json")
    settings = json.loads((place / "lm-ended" / "config.json").read_text())
    settings["eos_token_id"] = [0, 5]
    (place / "lm-ended" / "config.json").write_text(json.dumps(settings))
    run(shlex.split(f"{SHORT['TRAIN']} fine_tuning --out own"))
    other.save("own/model/tokenizer.json")


def snapshot(folder):
    """The files of a folder. Tokens of a text are complete, and the next run uses them."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "tokens"]
    return {path: path.read_bytes() for path in files}


def is_refused(bad, monkeypatch, capsys, line, words):
    """Run a line of a table. Bad input is one line that holds the words, and changes no file."""
    first, _, rest = line.partition(" ")
    name, *arguments = shlex.split(f"{SHORT.get(first, first)} {rest}")
    monkeypatch.chdir(bad)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    before = snapshot(bad)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1, message
    assert message.startswith(name) and all(word.strip() in message for word in words), message
    assert len(message) < 700 and "Errno" not in message
    assert str(ROOT) not in message  # files are named as they were typed
    # world.py names its folder in full, and a run's record its data.
    assert str(bad) not in message or name == "world.py" or "compare" in arguments
    assert snapshot(bad) == before


@pytest.mark.parametrize("line, words", [(line, words) for line, *words in ROWS])
def test_bad_input_is_one_line_and_status_2(bad, monkeypatch, capsys, line, words):
    is_refused(bad, monkeypatch, capsys, line, words)


DEEP = "[" * 100_000  # Python's reader of JSON gives up on it
SCORED = {"task": "a", "id": "1", "input": "x", "answers": ["b"], "prediction": "c"}
SCORED |= {"em": 1.0, "f1": 1.0}
RESUME = "RECUR --out run --resume"
# File | its text, or keys of its object that change, or another file | command line | words
SPOILT = [
    *(
        ("run/run.json", DEEP, line, "run/run.json: not a run record (maximum recursion")
        for line in (
            "runs.py verify run",
            "eval.py ask --run run who",
            "generate.py run who",
            RESUME,
        )
    ),
    (
        "run/run.json",
        '{"arguments": {"method": "a"}, "results": {}}',
        "runs.py verify run",
        "command",
    ),
    ("run/run.json", {"command": ""}, "runs.py verify run", "run/run.json: command is '', not"),
    (
        "run/run.json",
        {"command": "python train.py '"},
        "runs.py verify run",
        "run/run.json: command | No closing quotation",
    ),
    ("run/run.json", {"resumed": "x"}, RESUME, "run/run.json: | resumed is 'x', not a list of"),
    (
        "run/run.json",
        {"resumed": [{}]},
        "runs.py verify run",
        "run/run.json: | 'versions' is missing",
    ),
    (
        "run/run.json",
        {"hardware": {}},
        "runs.py verify run",
        "run/run.json: | 'threads' is missing",
    ),
    (
        "run/run.json",
        {"eos": "x"},
        "eval.py ask --run run who",
        "run/run.json: | eos is 'x', not a",
    ),
    *(
        (
            "run/run.json",
            {"arguments": {key: value}},
            "eval.py ask --run run who",
            f"{key} is {value!r}",
        )
        for key, value in {"pause": "two", "max_new_tokens": "many", "model": 5, "stop": 5}.items()
    ),
    (
        "run/state.safetensors",
        "mine/state.safetensors",
        RESUME,
        "run/state.safetensors: | another run",
    ),
    (
        "run/metrics.jsonl",
        '{"step": "two"}',
        RESUME,
        "run/metrics.jsonl: step is 'two', not a whole",
    ),
    ("run/adapter_config.json", DEEP, "adapters.py run", "run/adapter_config.json: not valid JSON"),
    (
        "mine/adapter_config.json",
        DEEP,
        "eval.py explain mine",
        "mine/adapter_config.json: not valid",
    ),
    (
        "mine/adapter_config.json",
        {"num_virtual_tokens": "4"},
        "eval.py ask --run mine who",
        "mine/adapter_config.json: num_virtual_tokens is '4', not a positive whole number",
    ),
    (
        "run/adapter_config.json",
        {"connector_layers": 10**9},
        "eval.py ask --run run who",
        "run: connector_layers is 1000000000, not a number of layers from 1 to 10,000",
    ),
    ("lm/model/config.json", DEEP, "generate.py lm/model who", "config.json: not valid JSON"),
    (
        "lm/model/config.json",
        {"num_hidden_layers": 10**9},
        "generate.py lm/model who",
        "lm/model/config.json: num_hidden_layers is 1000000000, not a number of layers from 1 to",
    ),
    (
        "fewer/score.json",
        "{}",
        "eval.py compare fewer fewer",
        "fewer/score.json: the key 'arguments'",
    ),
    (
        "fewer/score.json",
        '{"arguments": [1]}',
        "eval.py compare fewer fewer",
        "arguments is [1], not an",
    ),
    *(
        ("fewer/predictions.jsonl", text, f"eval.py {line}", f"fewer/predictions.jsonl:1: | {word}")
        for line in ("compare fewer run", "templates fewer")
        for text, word in (
            (DEEP, "maximum recursion"),
            (json.dumps(SCORED | {"task": []}), "task is [], not a text"),
            (json.dumps(SCORED | {"id": []}), "id is [], not a text or a whole number"),
            (json.dumps(SCORED | {"em": {}}), "em is {}, not a number from 0 to 1"),
            (json.dumps(SCORED | {"em": "high"}), "em is 'high', not"),
            (json.dumps(SCORED | {"em": float("nan")}), "em is nan, not"),
            (json.dumps(SCORED | {"prediction": None}), "prediction is None, not a text"),
            (json.dumps(SCORED | {"answers": 7}), "answers is 7, not a list of"),
        )
    ),
    (
        "fewer/predictions.jsonl",
        '{"task": "a", "id": 1}',
        "eval.py templates fewer",
        "'prediction' is mis",
    ),
]


def change(path, new):
    """Write a text, the bytes of another file, or the object in a file with other keys."""
    if isinstance(new, dict):
        old = json.loads(path.read_text())
        new = {key: old[key] | value if key == "arguments" else value for key, value in new.items()}
        new = json.dumps(old | new)
    elif new.endswith(".safetensors"):
        return path.write_bytes((path.parent.parent / new).read_bytes())
    path.write_text(new + "\n")


@pytest.mark.parametrize("file, new, line, words", SPOILT, ids=map(str, range(len(SPOILT))))
def test_a_file_of_a_run_with_other_values_is_named(
    bad, monkeypatch, capsys, file, new, line, words
):
    path = bad / file
    before = path.read_bytes() if path.is_file() else None
    change(path, new)
    try:
        is_refused(bad, monkeypatch, capsys, line, words.split("|"))
    finally:
        path.unlink() if before is None else path.write_bytes(before)


MEMORY = {
    "torch": lambda: torch.empty(2**60),
    "numpy": lambda: numpy.empty(2**50),
    "a GPU": lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")),
    "Python": lambda: fail(MemoryError()),
}


def fail(error):
    raise error


@pytest.mark.parametrize("case", MEMORY)
def test_too_little_memory_is_one_line(capsys, case):
    with pytest.raises(SystemExit) as stop:
        run_program("train.py", MEMORY[case])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("train.py: out of memory: ")
    assert len(message.splitlines()) == 1
    with pytest.raises(RuntimeError, match="shapes"):  # not hidden
        run_program("train.py", lambda: fail(RuntimeError("shapes do not fit")))


def test_every_program_is_in_the_table():
    programs = {p.name for p in ROOT.glob("*.py") if "\nif __name__ ==" in p.read_text()}
    assert {line.split()[0] for line, *_ in ROWS if "a" * 5000 in line} & programs == programs


@pytest.mark.parametrize("line, status, word", [("--lr nan", 2, "--lr"), ("--help", 0, "--method")])
def test_the_same_in_a_process_of_its_own(tmp_path, line, status, word):
    call = [sys.executable, ROOT / "train.py", "--method", "neural_recursion", *line.split()]
    result = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    shown = result.stderr if status else result.stdout
    assert result.returncode == status and word in shown and not list(tmp_path.iterdir())
    assert len(result.stderr.splitlines()) == (1 if status else 0)
