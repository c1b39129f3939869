#!/usr/bin/env bash
# Every table, one line a cell: `table | script and arguments | seeds`; {a,b} stands for a line with
# a and one with b, <ROW> for the run folder of the cell whose table ends in `: ROW`. A first call
# runs [claims], with a GPU [headline] too; --more and --all run the rest. It says beforehand what it
# will run and about how long; what is finished is not run again; it ends by writing RESULTS.md and
# figures/. --help lists the flags: --dry-run, --only PATTERN, --seeds N (one by default), --jobs N, ...
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" requirements.txt
exec "$PY" -m tools.report run "$@" <<'CELLS'

[claims] # letters: what each paper claims, beside its own baseline with as many image passes

claim similarity: verification      | python toy_similarity.py --points 0,0.2,0.5                     | 0,1,2
claim SSP, overall, few: CE         | python ssp_pretrain.py --ssp none                               | 0,1,2
claim SSP, overall, few: SSP + CE   | python ssp_pretrain.py --train-epochs 160                       | 0,1,2
claim TSC, overall, few, uniformity: KCL | python tsc.py --method kcl                             | 0,1,2
claim TSC, overall, few, uniformity: TSC | python tsc.py                                          | 0,1,2
claim IP-DPP, overall, few: uniform | python bns_ipdpp.py --finetune-epochs 150 --stages finetune --subset-mode uniform --init-from <k-DPP>/pretrain.pt | 0,1,2
claim IP-DPP, overall, few: k-DPP   | python bns_ipdpp.py --epochs 30 --finetune-epochs 150 --init-from <SSP + CE>/pretrain.pt | 0,1,2
claim BNS, overall, few: CE after rotation | python ssp_pretrain.py --stages train --train-epochs 99 --init-from <SSP + CE>/pretrain.pt | 0,1,2
claim BNS, overall, few: BNS + IP-DPP | python bns_ipdpp.py --epochs 30 --finetune-epochs 150 --init-from <SSP + CE>/pretrain.pt | 0,1,2
claim FSGL, overall, few: GLMC + SAM | python fsgl.py --method glmc_sam --epochs 15 --init-from <CE>/train.pt | 0,1,2
claim FSGL, overall, few: FSGL      | python fsgl.py --epochs 15 --fcc 0.1 --init-from <CE>/train.pt  | 0,1,2
claim TailCalibX, overall, few: cosine CE | python tailcalibx.py --method cosine_ce --epochs 100      | 0,1,2
claim TailCalibX, overall, few: TailCalibX | python tailcalibx.py --stages tailcalibx --init-from <cosine CE>/cosine_ce.pt | 0,1,2

[headline] # real images at ratio 100, one line a paper; with a GPU

headline: CE                        | python ssp_pretrain.py --dataset cifar10_lt --ssp none          | 0,1,2
headline: SSP + CE                  | python ssp_pretrain.py --dataset cifar10_lt                     | 0,1,2
headline: TSC                       | python tsc.py --dataset cifar10_lt                              | 0,1,2
headline: BNS + IP-DPP              | python bns_ipdpp.py --dataset cifar10_lt                        | 0,1,2
headline: FSGL                      | python fsgl.py --dataset cifar10_lt                             | 0,1,2
headline: CBD + TailCalibX          | python tailcalibx.py --dataset cifar100_lt --method cbd_tailcalibx | 0,1,2
CIFAR-10: verification              | python toy_similarity.py --dataset cifar10_lt                   | 0,1,2

[more] # letters: all methods with as many image passes (200 times the training set), and ablations

league, letters: CE                 | python ssp_pretrain.py --ssp none                               | 0,1,2
league, letters: CE, as in FSGL     | python fsgl.py --method ce                                      | 0,1,2
league, letters: balanced softmax   | python ssp_pretrain.py --ssp none --loss balanced               | 0,1,2
league, letters: LDAM-DRW           | python ssp_pretrain.py --ssp none --loss ldam --rule drw        | 0,1,2
league, letters: SSP                | python ssp_pretrain.py --train-epochs 160                       | 0,1,2
league, letters: KCL                | python tsc.py --method kcl                                      | 0,1,2
league, letters: TSC                | python tsc.py                                                   | 0,1,2
league, letters: BNS + IP-DPP       | python bns_ipdpp.py                                             | 0,1,2
league, letters: GLMC               | python fsgl.py --method glmc                                    | 0,1,2
league, letters: FSGL               | python fsgl.py --epochs 50                                      | 0,1,2
league, letters: TailCalibX         | python tailcalibx.py                                            | 0,1,2

claim FSGL (100 epochs), overall, few: GLMC + SAM | python fsgl.py --method glmc_sam                  | 0,1,2
claim FSGL (100 epochs), overall, few: FSGL | python fsgl.py                                          | 0,1,2
claim TailCalibX (one call), overall, few: cosine CE | python tailcalibx.py --method cosine_ce        | 0,1,2
claim TailCalibX (one call), overall, few: TailCalibX | python tailcalibx.py                          | 0,1,2

letters, similarity: the rest       | python toy_similarity.py --method {verification,control,sweep1,sweep2} | 0,1,2
letters, SSP: from scratch          | python ssp_pretrain.py --ssp none --rule {none,resample,reweight,drw} | 0,1,2
letters, SSP: from scratch          | python ssp_pretrain.py --ssp none --loss {focal,ldam}           | 0,1,2
letters, SSP: from scratch          | python ssp_pretrain.py --ssp none --stages train,classifier     | 0,1,2
letters, SSP: after rotation        | python ssp_pretrain.py --rule {none,resample,reweight,drw}      | 0,1,2
letters, SSP: after rotation        | python ssp_pretrain.py --loss {focal,ldam}                      | 0,1,2
letters, SSP: after rotation        | python ssp_pretrain.py --stages pretrain,train,classifier       | 0,1,2
letters, SSP: after MoCo            | python ssp_pretrain.py --ssp moco                               | 0,1,2
letters, semi-supervised: leftover  | python ssp_pretrain.py --ssp none --stages train,pseudo,semi --unlabeled leftover --imb-ratio-unlabeled {1,100} | 0,1,2
letters, TSC: after rotation        | python tsc.py --method {kcl,tsc} --epochs 50 --init-from <SSP>/pretrain.pt | 0,1,2
letters, BNS: probe                 | python bns_ipdpp.py --method bns                                | 0,1,2
letters, BNS: default               | python bns_ipdpp.py                                             | 0,1,2
letters, BNS: subsets               | python bns_ipdpp.py --stages finetune --subset-mode {uniform,legacy} --init-from <default>/pretrain.pt | 0,1,2
letters, BNS: subsets               | python bns_ipdpp.py --stages finetune --subset-mode all --finetune-epochs 122 --init-from <default>/pretrain.pt | 0,1,2
letters, BNS: subsets               | python bns_ipdpp.py --stages finetune --dpp-scale n2 --init-from <default>/pretrain.pt | 0,1,2
letters, TailCalibX: CE, linear     | python tailcalibx.py --method ce                                | 0,1,2
letters, TailCalibX: CE + cRT       | python tailcalibx.py --method crt                               | 0,1,2
letters, TailCalibX: CE + MODALS    | python tailcalibx.py --method modals --stages modals --init-from <CE, linear>/ce.pt | 0,1,2
letters, TailCalibX: CE + TailCalib | python tailcalibx.py --method ce_tailcalib --stages tailcalib --init-from <CE, linear>/ce.pt | 0,1,2
letters, TailCalibX: TailCalib      | python tailcalibx.py --method tailcalib                         | 0,1,2
letters, TailCalibX: CBD            | python tailcalibx.py --method cbd --stages cbd --init-from <cosine CE>/cosine_ce.pt | 0,1,2
letters, TailCalibX: CBD + TailCalibX | python tailcalibx.py --method cbd_tailcalibx --stages tailcalibx --init-from <CBD>/cbd.pt | 0,1,2
letters, TailCalibX: real features  | python tailcalibx.py --no-generate                              | 0,1,2

[all] # CIFAR: all methods with as many image passes, ResNet-32

league, CIFAR-LT: CE                | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --ssp none | 0,1,2
league, CIFAR-LT: balanced softmax  | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --ssp none --loss balanced | 0,1,2
league, CIFAR-LT: LDAM-DRW          | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --ssp none --loss ldam --rule drw | 0,1,2
league, CIFAR-LT: SSP               | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --epochs 100 --train-epochs 100 | 0,1,2
league, CIFAR-LT: KCL               | python tsc.py --dataset {cifar10_lt,cifar100_lt} --method kcl --epochs 100 | 0,1,2
league, CIFAR-LT: TSC               | python tsc.py --dataset {cifar10_lt,cifar100_lt} --epochs 100   | 0,1,2
league, CIFAR-LT: BNS + IP-DPP      | python bns_ipdpp.py --dataset cifar10_lt --backbone resnet32 --epochs 80 --finetune-epochs 152 | 0,1,2
league, CIFAR-LT: BNS + IP-DPP      | python bns_ipdpp.py --dataset cifar100_lt --backbone resnet32 --epochs 80 --finetune-epochs 130 | 0,1,2
league, CIFAR-LT: FSGL              | python fsgl.py --dataset {cifar10_lt,cifar100_lt} --backbone resnet32 --epochs 50 | 0,1,2
league, CIFAR-LT: TailCalibX        | python tailcalibx.py --dataset {cifar10_lt,cifar100_lt} --backbone resnet32 --epochs 200 | 0,1,2

# a handful of epochs, to see that the path works: half an hour of a CPU with --cifar
CIFAR-10-LT, few epochs: SSP        | python ssp_pretrain.py --dataset cifar10_lt --epochs 1 --train-epochs 2 | 0
CIFAR-10-LT, few epochs: TSC        | python tsc.py --dataset cifar10_lt --epochs 2 --classifier-epochs 1 --batch-size 256 | 0
CIFAR-10-LT, few epochs: BNS        | python bns_ipdpp.py --dataset cifar10_lt --backbone resnet32 --epochs 1 --finetune-epochs 2 | 0
CIFAR-10-LT, few epochs: FSGL       | python fsgl.py --dataset cifar10_lt --data-seed 0 --backbone resnet32 --epochs 1 | 0
CIFAR-10-LT, few epochs: TailCalibX | python tailcalibx.py --dataset cifar10_lt --epochs 2 --classifier-epochs 1 | 0

# --- the papers' tables

# Similarity or sample number
CIFAR-10: similarity                | python toy_similarity.py --dataset cifar10_lt --method {control,sweep1,sweep2} | 0,1,2

# Self-supervised pre-training: eight recipes, two sets, four ratios; LDAM-DRW; MoCo; other depths
headline: CE + DRW                  | python ssp_pretrain.py --dataset cifar10_lt --ssp none --rule drw | 0,1,2
headline: SSP + DRW                 | python ssp_pretrain.py --dataset cifar10_lt --rule drw --stages train --init-from <SSP + CE>/pretrain.pt | 0,1,2
headline: LDAM-DRW                  | python ssp_pretrain.py --dataset cifar10_lt --ssp none --loss ldam --rule drw | 0,1,2
CIFAR-LT: SSP                       | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,50,20,10} --ssp {none,rotation} --rule {none,resample,reweight,drw} | 0,1,2
CIFAR-LT: SSP (LDAM-DRW)            | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,10} --ssp {none,rotation} --loss ldam --rule drw | 0,1,2
CIFAR-LT: SSP (MoCo)                | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --ssp moco | 0,1,2
CIFAR-LT: SSP (depth)               | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,50,20,10} --backbone resnet{32,44,56,110} --ssp {none,rotation} --loss ldam | 0
CIFAR-LT: SSP (depth)               | python ssp_pretrain.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,50,20,10} --backbone resnet{44,56,110} --ssp {none,rotation} --rule {none,resample,reweight} | 0
ImageNet-LT: SSP                    | python ssp_pretrain.py --dataset imagenet_lt --ssp none | 0
ImageNet-LT: SSP                    | python ssp_pretrain.py --dataset imagenet_lt --ssp none --stages train,classifier | 0
ImageNet-LT: SSP                    | python ssp_pretrain.py --dataset imagenet_lt --ssp moco | 0
ImageNet-LT: SSP                    | python ssp_pretrain.py --dataset imagenet_lt --ssp moco --stages pretrain,train,classifier | 0
ImageNet-LT: SSP                    | python ssp_pretrain.py --dataset imagenet_lt --ssp moco --rule resample | 0
iNaturalist 2018: SSP               | python ssp_pretrain.py --dataset inat18 --ssp none | 0
iNaturalist 2018: SSP               | python ssp_pretrain.py --dataset inat18 --ssp none --stages train,classifier | 0
iNaturalist 2018: SSP               | python ssp_pretrain.py --dataset inat18 --ssp moco | 0
iNaturalist 2018: SSP               | python ssp_pretrain.py --dataset inat18 --ssp moco --stages pretrain,train,classifier | 0
iNaturalist 2018: SSP               | python ssp_pretrain.py --dataset inat18 --ssp moco --rule resample | 0
semi-supervised: leftover           | python ssp_pretrain.py --dataset {cifar10_lt,svhn_lt} --imb-ratio 50 --ssp none --stages train,pseudo,semi --unlabeled leftover --imb-ratio-unlabeled {1,25,50,100} | 0,1,2

# KCL and TSC: ImageNet-LT in five trials, CIFAR, the weight of the targets, the dimension, without warm-up
ImageNet-LT: TSC                    | python tsc.py --dataset imagenet_lt --method {kcl,tsc}          | 0,1,2,3,4
ImageNet-LT: TSC (epochs)           | python tsc.py --dataset imagenet_lt --method {kcl,tsc} --epochs 200 | 0
ImageNet-LT: TSC (no warm-up)       | python tsc.py --dataset imagenet_lt --warmup 0                  | 0
iNaturalist 2018: TSC               | python tsc.py --dataset inat18                                  | 0
CIFAR-LT: TSC                       | python tsc.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,50,10} --method {kcl,tsc} | 0,1,2
CIFAR, balanced: TSC                | python tsc.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio 1 --method {kcl,tsc} | 0
CIFAR-10-LT: TSC (lambda)           | python tsc.py --dataset cifar10_lt --target-weight {0.01,0.05,0.1,0.3,0.5,1,2,5,10} | 0,1,2
CIFAR-10-LT: TSC (d)                | python tsc.py --dataset cifar10_lt --method {kcl,tsc} --projection-dim {3,10,32,64} | 0,1,2
CIFAR-10-LT: TSC (no warm-up)       | python tsc.py --dataset cifar10_lt --warmup 0                   | 0,1,2

# Balanced negative sampling and k-DPP subsets: five ratios, probe, subsets
CIFAR-LT: BNS + IP-DPP              | python bns_ipdpp.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,200,50,20,10} | 0,1,2
CIFAR-LT: BNS (probe)               | python bns_ipdpp.py --dataset {cifar10_lt,cifar100_lt} --method bns | 0,1,2
CIFAR-10-LT: BNS (subsets)          | python bns_ipdpp.py --dataset cifar10_lt --stages finetune --init-from <BNS + IP-DPP>/pretrain.pt --subset-mode {uniform,legacy,all} | 0,1,2
CIFAR-10-LT: BNS (subsets)          | python bns_ipdpp.py --dataset cifar10_lt --stages finetune --init-from <BNS + IP-DPP>/pretrain.pt --dpp-scale n2 | 0,1,2

# FSGL: what the gain buys on top of mixing and SAM
CIFAR-LT: FSGL                      | python fsgl.py --dataset {cifar10_lt,cifar100_lt} --imb-ratio {100,50,10} --method {fsgl,glmc_sam,glmc,ce} | 0,1,2
CIFAR-10-LT: FSGL (gain)            | python fsgl.py --dataset cifar10_lt --fcc {0.5,1}               | 0,1,2
CIFAR-10-LT: FSGL (gain)            | python fsgl.py --dataset cifar10_lt --fsm-mode {same,half}      | 0,1,2
ImageNet-LT: FSGL                   | python fsgl.py --dataset imagenet_lt --method {fsgl,glmc_sam}   | 0
ImageNet-LT: FSGL (launch script)   | python fsgl.py --dataset imagenet_lt --epochs 200 --batch-size 64 --resample-weighting 0 | 0

# TailCalibX and its baselines; the released teachers saw another subset; generation ablation
CIFAR-100-LT: TailCalibX            | python tailcalibx.py --dataset cifar100_lt --imb-ratio {100,50,10} --method {ce,cosine_ce,crt,cbd,modals,tailcalib,tailcalibx,cbd_tailcalibx,ce_tailcalib} | 0,1,2
CIFAR-100-LT: TailCalibX (released teacher subset) | python tailcalibx.py --dataset cifar100_lt --imb-ratio {100,50,10} --method cbd_tailcalibx --teacher-data-seed 10 | 0,1,2
CIFAR-100-LT: TailCalibX (generation) | python tailcalibx.py --dataset cifar100_lt {--no-generate,--alpha 0.1,--alpha 0.2,--alpha 0.2 --alpha-mode diag,--topk 1,--topk 5} | 0,1,2
mini-ImageNet-LT: TailCalibX        | python tailcalibx.py --dataset mini_imagenet_lt --imb-ratio {100,50,10} --method {ce,cosine_ce,crt,cbd,modals,tailcalib,tailcalibx,cbd_tailcalibx,ce_tailcalib} | 0

CELLS
