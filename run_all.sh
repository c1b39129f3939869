#!/usr/bin/env bash
# Every table, one line a cell: `table | script and arguments | seeds`; {a,b} stands for one line with a and one with b.
# What this machine cannot do is skipped and said, finished cells are not run again; ends by writing RESULTS.md and
# figures/. `bash run_all.sh --help` lists the flags: --dry-run, --only PATTERN, --seeds N (one by default), --more (the
# lines `more ...` of the embedded set), --jobs N, --cifar, --data-root DIR, ...
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" requirements.txt
exec "$PY" -m tools.report run "$@" <<'CELLS'

# --- letters: what a first call runs

# Similarity or sample number
letters, verification            | python toy_similarity.py --experiment verification --dataset glyphs_lt             | 0,1,2

# All methods with as many forward + backward image passes (200 times the training set), see the head of RESULTS.md
comparison, letters: CE          | python ssp_pretrain.py --ssp none                                                  | 0,1,2
comparison, letters: CE, as in FSGL | python fsgl.py --variant ce                                                 | 0,1,2
comparison, letters: LDAM-DRW    | python ssp_pretrain.py --ssp none --loss ldam --rule drw                           | 0,1,2
comparison, letters: SSP         | python ssp_pretrain.py --ssp rotation --epochs 40 --train-epochs 160               | 0,1,2
comparison, letters: KCL         | python tsc.py --method kcl                                                         | 0,1,2
comparison, letters: TSC         | python tsc.py --method tsc                                                         | 0,1,2
comparison, letters: BNS+IP-DPP  | python bns_ipdpp.py                                                                | 0,1,2
comparison, letters: GLMC        | python fsgl.py --variant glmc                                                      | 0,1,2
comparison, letters: FSGL        | python fsgl.py --variant fsgl --epochs 50                                          | 0,1,2
comparison, letters: TailCalibX  | python tailcalibx.py                                                               | 0,1,2

# Baselines
letters, TailCalibX              | python tailcalibx.py --pipeline crt                                                | 0,1,2

# --- letters, the other rows (--more)
more letters, verification (control) | python toy_similarity.py --experiment verification --dataset glyphs_lt --control | 0,1,2
more letters, sweeps             | python toy_similarity.py --experiment {sweep1,sweep2} --dataset glyphs_lt          | 0,1,2
more letters, SSP                | python ssp_pretrain.py --compare                                                   | 0,1,2
more letters, SSP                | python ssp_pretrain.py --compare --rule {drw,resample,reweight}                    | 0,1,2
more letters, SSP                | python ssp_pretrain.py --compare --loss {focal,ldam}                               | 0,1,2
more letters, SSP                | python ssp_pretrain.py --compare --ssp moco                                        | 0,1,2
more letters, SSP                | python ssp_pretrain.py --compare --two-stage                                       | 0,1,2
more letters, semi-supervised    | python ssp_pretrain.py --ssp none --unlabeled-source leftover --imb-ratio-unlabeled {1,100} | 0,1,2
more letters, BNS (subsets)      | python bns_ipdpp.py --subset-mode {uniform,legacy,all}                             | 0,1,2
more letters, BNS (subsets)      | python bns_ipdpp.py --dpp-scale n2                                                 | 0,1,2
more letters, BNS (probe)        | python bns_ipdpp.py --stages pretrain,probe                                        | 0,1,2
more letters, FSGL               | python fsgl.py --variant {fsgl,glmc_sam}                                        | 0,1,2
more letters, TailCalibX         | python tailcalibx.py --pipeline {tailcalib,ce,cosine_ce,cbd,modals,cbd_tailcalibx,ce_tailcalib} | 0,1,2
more letters, TailCalibX         | python tailcalibx.py --no-generate                                                 | 0,1,2

# --- CIFAR: all methods with as many image passes, ResNet-32
comparison, CIFAR-LT: CE         | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --ssp none               | 0,1,2
comparison, CIFAR-LT: LDAM-DRW   | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --ssp none --loss ldam --rule drw | 0,1,2
comparison, CIFAR-LT: SSP        | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --epochs 100 --train-epochs 100 | 0,1,2
comparison, CIFAR-LT: KCL        | python tsc.py --dataset {cifar10_lt,cifar100_lt} --method kcl --epochs 100         | 0,1,2
comparison, CIFAR-LT: TSC        | python tsc.py --dataset {cifar10_lt,cifar100_lt} --method tsc --epochs 100         | 0,1,2
comparison, CIFAR-LT: BNS+IP-DPP | python bns_ipdpp.py --dataset cifar10_lt --backbone resnet32 --epochs 80 --finetune-epochs 152 | 0,1,2
comparison, CIFAR-LT: BNS+IP-DPP | python bns_ipdpp.py --dataset cifar100_lt --backbone resnet32 --epochs 80 --finetune-epochs 130 | 0,1,2
comparison, CIFAR-LT: FSGL       | python fsgl.py --dataset {cifar10_lt,cifar100_lt} --backbone resnet32 --epochs 50  | 0,1,2
comparison, CIFAR-LT: TailCalibX | python tailcalibx.py --dataset {cifar10_lt,cifar100_lt} --backbone resnet32 --epochs 200 | 0,1,2

# a handful of epochs, to see that the path works: half an hour of a CPU with --cifar
CIFAR-10-LT, few epochs          | python ssp_pretrain.py --dataset cifar10_lt --compare --epochs 1 --train-epochs 2  | 0
CIFAR-10-LT, few epochs          | python tsc.py --dataset cifar10_lt --epochs 2 --classifier-epochs 1 --batch-size 256 | 0
CIFAR-10-LT, few epochs          | python bns_ipdpp.py --dataset cifar10_lt --backbone resnet32 --epochs 1 --finetune-epochs 2 | 0
CIFAR-10-LT, few epochs          | python fsgl.py --dataset cifar10_lt --backbone resnet32 --epochs 1                 | 0
CIFAR-10-LT, few epochs          | python tailcalibx.py --dataset cifar10_lt --epochs 2 --clf-epochs 1                | 0

# --- the papers' tables

# Similarity or sample number
CIFAR-10, verification           | python toy_similarity.py --experiment verification --dataset cifar10_lt            | 0,1,2
CIFAR-10, verification (control) | python toy_similarity.py --experiment verification --dataset cifar10_lt --control  | 0,1,2
CIFAR-10, sweeps                 | python toy_similarity.py --experiment {sweep1,sweep2} --dataset cifar10_lt         | 0,1,2

# Self-supervised pre-training: eight recipes, two sets, four ratios; released settings; LDAM-DRW; MoCo; other depths
CIFAR-LT, SSP                    | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,50,20,10} --ssp {none,rotation} --rule {none,resample,reweight,drw} | 0,1,2
CIFAR-LT, SSP (released)         | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --ssp {none,rotation} --recipe released | 0,1,2
CIFAR-LT, SSP (LDAM-DRW)         | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,10} --ssp {none,rotation} --loss ldam --rule drw | 0,1,2
CIFAR-LT, SSP (MoCo)             | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --ssp moco               | 0,1,2
CIFAR-LT, SSP (depth)            | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,50,20,10} --depth {32,44,56,110} --ssp {none,rotation} --loss ldam | 0
CIFAR-LT, SSP (depth)            | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,50,20,10} --depth {44,56,110} --ssp {none,rotation} --rule {none,resample,reweight} | 0
ImageNet-LT, SSP                 | python ssp_pretrain.py --dataset imagenet_lt --ssp {none,moco} {,--two-stage}      | 0
ImageNet-LT, SSP                 | python ssp_pretrain.py --dataset imagenet_lt --ssp moco --rule resample            | 0
iNaturalist 2018, SSP            | python ssp_pretrain.py --dataset inat18 --ssp {none,moco} {,--two-stage}           | 0
iNaturalist 2018, SSP            | python ssp_pretrain.py --dataset inat18 --ssp moco --rule resample                 | 0
CIFAR-10-LT, semi-supervised     | python ssp_pretrain.py --dataset cifar10_lt --imb-ratio 50 --ssp none --unlabeled-source leftover --imb-ratio-unlabeled {1,25,50,100} | 0,1,2
SVHN-LT, semi-supervised         | python ssp_pretrain.py --dataset svhn_lt --imb-ratio 50 --ssp none --unlabeled-source leftover --imb-ratio-unlabeled {1,25,50,100} | 0,1,2

# KCL and TSC: ImageNet-LT in five trials, CIFAR, the weight of the targets, the dimension, without warm-up
ImageNet-LT, TSC                 | python tsc.py --dataset imagenet_lt --method {kcl,tsc}                             | 0,1,2,3,4
ImageNet-LT, TSC (epochs)        | python tsc.py --dataset imagenet_lt --method {kcl,tsc} --epochs 200                | 0
ImageNet-LT, TSC (no warm-up)    | python tsc.py --dataset imagenet_lt --warmup 0                                     | 0
iNaturalist 2018, TSC            | python tsc.py --dataset inat18                                                     | 0
CIFAR-LT, TSC                    | python tsc.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,50,10} --method {kcl,tsc} | 0,1,2
CIFAR, balanced                  | python tsc.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio 1 --method {kcl,tsc}  | 0
CIFAR-10-LT, TSC (lambda)        | python tsc.py --dataset cifar10_lt --target-weight {0.01,0.05,0.1,0.3,0.5,1,2,5,10} | 0,1,2
CIFAR-10-LT, TSC (d)             | python tsc.py --dataset cifar10_lt --method {kcl,tsc} --projection-dim {3,10,32,64} | 0,1,2
CIFAR-10-LT, TSC (no warm-up)    | python tsc.py --dataset cifar10_lt --warmup 0                                      | 0,1,2

# Balanced negative sampling and k-DPP subsets: five ratios, probe, subsets, released
CIFAR-LT, BNS+IP-DPP             | python bns_ipdpp.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,200,50,20,10} | 0,1,2
CIFAR-LT, BNS (probe)            | python bns_ipdpp.py --dataset {cifar10_lt,cifar100_lt} --stages pretrain,probe     | 0,1,2
CIFAR-10-LT, BNS (subsets)       | python bns_ipdpp.py --dataset cifar10_lt --subset-mode {uniform,legacy,all}        | 0,1,2
CIFAR-10-LT, BNS (subsets)       | python bns_ipdpp.py --dataset cifar10_lt --dpp-scale n2                            | 0,1,2
CIFAR-LT, BNS (released)         | python bns_ipdpp.py --dataset {cifar10_lt,cifar100_lt} --recipe released           | 0,1,2

# FSGL: what the gain buys on top of mixing and SAM
CIFAR-10-LT, FSGL                | python fsgl.py --dataset cifar10_lt --imb-ratio {100,50,10} --variant {fsgl,glmc_sam,glmc,ce} | 0,1,2
CIFAR-100-LT, FSGL               | python fsgl.py --dataset cifar100_lt --imb-ratio {100,50,10} --variant {fsgl,glmc_sam,glmc,ce} | 0,1,2
CIFAR-10-LT, FSGL (gain)         | python fsgl.py --dataset cifar10_lt --fcc {0.5,1}                                  | 0,1,2
CIFAR-10-LT, FSGL (gain)         | python fsgl.py --dataset cifar10_lt --fsm-mode {same,half}                         | 0,1,2
CIFAR-LT, FSGL (released)        | python fsgl.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,50} --recipe released | 0,1,2
ImageNet-LT, FSGL                | python fsgl.py --dataset imagenet_lt --variant {fsgl,glmc_sam}                     | 0
ImageNet-LT, FSGL (launch script) | python fsgl.py --dataset imagenet_lt --epochs 200 --batch-size 64 --resample-weighting 0 | 0

# TailCalibX and its baselines; the released teachers saw another subset; generation ablation
CIFAR-100-LT, TailCalibX         | python tailcalibx.py --dataset cifar100_lt --imb-ratio {100,50,10} --pipeline {ce,cosine_ce,crt,cbd,modals,tailcalib,tailcalibx,cbd_tailcalibx,ce_tailcalib} | 0,1,2
CIFAR-100-LT, TailCalibX (released) | python tailcalibx.py --dataset cifar100_lt --imb-ratio {100,50,10} --pipeline {cosine_ce,tailcalibx,cbd_tailcalibx} --recipe released | 1,2,3
CIFAR-100-LT, TailCalibX (released teacher subset) | python tailcalibx.py --dataset cifar100_lt --imb-ratio {100,50,10} --pipeline cbd_tailcalibx --teacher-data-seed 10 | 0,1,2
CIFAR-100-LT, TailCalibX (generation) | python tailcalibx.py --dataset cifar100_lt {--no-generate,--alpha 0.1,--alpha 0.2,--alpha 0.2 --alpha-mode diag,--topk 1,--topk 5} | 0,1,2
mini-ImageNet-LT, TailCalibX     | python tailcalibx.py --dataset mini_imagenet_lt --imb-ratio {100,50,10} --pipeline {ce,cosine_ce,crt,cbd,modals,tailcalib,tailcalibx,cbd_tailcalibx,ce_tailcalib} | 0

CELLS
