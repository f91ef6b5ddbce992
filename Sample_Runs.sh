#!/usr/bin/env bash
# Named one-liners: the demo and the published settings.
#
#   bash Sample_Runs.sh --list                 show them
#   bash Sample_Runs.sh NAME [more flags]      run one; later flags take precedence
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

runs() {
    local resnet="--arch resnet50 --lr 1e-5 --bs 112 --embed_dim 128 --gamma 0.3"
    local google="--arch googlenet --lr 1e-4 --bs 112 --embed_dim 512 --gamma 0.3"
    local margin="--loss marginloss --sampling distance"
    local semihard="--loss triplet --sampling semihard"
    local softhard="--loss triplet --sampling softhard"
    local npair="--loss npair --sampling npair"
    local proxynca="--loss proxynca"
    local photographs="--dataset caltech101 --arch timm:tf_efficientnet_lite0 --freeze_trunk --cache_features --n_epochs 20 --save_interval 4"
    local study="--dataset caltech101 --arch timm:tf_efficientnet_lite0 --freeze_trunk --cache_features --split_scheme cross_validation --n_epochs 8 --save_interval 2 --eval_metrics Recall MAP@R --eval_metric_for_best_epoch MAP@R --no-pictures --no-tensorboard --lr~LOG_BAYESIAN~ 1e-6 1e-2"
    local rc="--config reality_check"
    local demo="--dataset glyphs --arch resnet18 --not_pretrained --check_untrained_accuracy --savename demo"
    cat <<TABLE
demo                                      $demo --loss marginloss --crop_size 48 --bs 56 --lr 1e-3 --n_epochs 4 --tau 3
cub200-resnet50-margin                    --dataset cub200 $resnet $margin --n_epochs 50 --tau 30
cub200-resnet50-triplet                   --dataset cub200 $resnet $semihard --n_epochs 50 --tau 30
cub200-resnet50-npair                     --dataset cub200 $resnet $npair --n_epochs 55 --tau 35
cub200-resnet50-proxynca                  --dataset cub200 $resnet $proxynca --n_epochs 40 --tau 25
cars196-resnet50-margin                   --dataset cars196 $resnet $margin --n_epochs 70 --tau 45
cars196-resnet50-triplet                  --dataset cars196 $resnet $semihard --n_epochs 70 --tau 45
cars196-resnet50-npair                    --dataset cars196 $resnet $npair --n_epochs 85 --tau 55
cars196-resnet50-proxynca                 --dataset cars196 $resnet $proxynca --n_epochs 40 --tau 25
online_products-resnet50-margin           --dataset online_products $resnet $margin --n_epochs 40 --tau 30
online_products-resnet50-triplet          --dataset online_products $resnet $semihard --n_epochs 40 --tau 30
online_products-resnet50-npair            --dataset online_products $resnet $npair --n_epochs 25 --tau 15 20
in-shop-resnet50-margin                   --dataset in-shop $resnet $margin --n_epochs 40 --tau 25
in-shop-resnet50-triplet                  --dataset in-shop $resnet $semihard --n_epochs 40 --tau 25
in-shop-resnet50-npair                    --dataset in-shop $resnet $npair --n_epochs 40 --tau 25
cub200-googlenet-margin                   --dataset cub200 $google $margin --n_epochs 60 --tau 10 20 30 40 50
cub200-googlenet-triplet                  --dataset cub200 $google $semihard --n_epochs 70 --tau 15 40 60
cub200-googlenet-npair                    --dataset cub200 $google $npair --n_epochs 150 --tau 100
cub200-googlenet-proxynca                 --dataset cub200 $google $proxynca --n_epochs 25 --tau 7 17
cars196-googlenet-margin                  --dataset cars196 $google $margin --n_epochs 70 --tau 30 50
cars196-googlenet-triplet                 --dataset cars196 $google $semihard --n_epochs 70 --tau 30 50
cars196-googlenet-npair                   --dataset cars196 $google $npair --n_epochs 85 --tau 40 65
cars196-googlenet-proxynca                --dataset cars196 $google $proxynca --n_epochs 40 --tau 20 30
online_products-googlenet-margin          --dataset online_products $google $margin --n_epochs 20 --tau 2 6
online_products-googlenet-triplet         --dataset online_products $google $semihard --n_epochs 40 --tau 10
online_products-googlenet-npair           --dataset online_products $google $npair --n_epochs 20 --tau 2 6
in-shop-googlenet-margin                  --dataset in-shop $google $margin --n_epochs 40 --tau 25
in-shop-googlenet-triplet                 --dataset in-shop $google $semihard --n_epochs 40 --tau 25
in-shop-googlenet-npair                   --dataset in-shop $google $npair --n_epochs 40 --tau 25
cub200-proxy_anchor                       --config proxy_anchor
cars196-proxy_anchor                      --config proxy_anchor --dataset cars196 --scheduler_params step_size=10
cub200-proxynca++                         --config proxynca++
cub200-zero_shot                          --config zero_shot --dataset cub200
cub200-dinov2                             --config dinov2 --dataset cub200
reality_check-contrastive                 $rc reality_check_contrastive
reality_check-triplet                     $rc reality_check_triplet
reality_check-ntxent                      $rc reality_check_ntxent
reality_check-proxynca                    $rc reality_check_proxynca
reality_check-margin                      $rc reality_check_margin
reality_check-cosface                     $rc reality_check_cosface
reality_check-arcface                     $rc reality_check_arcface
reality_check-fastap                      $rc reality_check_fastap
reality_check-multi_similarity            $rc reality_check_multi_similarity
reality_check-multi_similarity_miner      $rc reality_check_multi_similarity_miner
reality_check-soft_triple                 $rc reality_check_soft_triple
benchmark-losses                          benchmark_losses.py --savename losses $photographs
tune-margin                               tune.py --savename margin $study --loss marginloss --margin~BAYESIAN~ 0.05 0.5 --beta~BAYESIAN~ 0.6 1.4
tune-proxy_anchor                         tune.py --savename proxy_anchor $study --loss ProxyAnchorLoss --loss_params margin~BAYESIAN~=[0,0.5] alpha~LOG_BAYESIAN~=[4,128]
tune-multi_similarity                     tune.py --savename multi_similarity $study --loss MultiSimilarityLoss --loss_params alpha~LOG_BAYESIAN~=[0.1,100] beta~LOG_BAYESIAN~=[1,100] base~BAYESIAN~=[0,1]
TABLE
}

name=${1:---help}
case $name in
    --list) runs; exit 0 ;;
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
flags=$(runs | awk -v name="$name" '$1 == name { $1 = ""; print }')
if [ -z "$flags" ]; then
    echo "error: there is no run named $name: bash Sample_Runs.sh --list shows all" >&2
    exit 2
fi
bash install.sh
case $flags in
    " benchmark_losses.py "* | " tune.py "*) ;;
    *) flags="main.py $flags" ;;
esac
# shellcheck disable=SC2086 # the flags hold no spaces of their own
exec "${DML_VENV:-.venv}/bin/python" $flags "${@:2}"
