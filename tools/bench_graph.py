#!/usr/bin/env python3
"""What the channel graph makes of whole zoos: tools/bench_graph.py torchvision timm -o docs/results/graph.json

Every model, in a process of its own: traced, cut to about half the channels of every group at random, proved in float64, run
forward and backward. Says how many groups there are, which share of the multiply-accumulates is prunable, and the CPU seconds of
export, grouping and surgery. --torch-pruning does the same with Torch-Pruning, the best public tool, beside it. What was done is
kept in the output file; a second call goes on where the first stopped.

  tools/bench_graph.py resnet18 swin_t                  two models of torchvision
  tools/bench_graph.py timm:mobilevit_s                 one of timm
  tools/bench_graph.py torchvision --torch-pruning      all classifiers of torchvision, both tools
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Edge models, one or a few of every family that timm has; chosen by name before any was tried.
TIMM = """
    beit_base_patch16_224 bat_resnext26ts botnet26t_256 halonet26t eca_resnext26ts gernet_s repvgg_a0 mobileone_s0 resnet26t
    cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 cs3darknet_s
    cspresnet50 cspresnext50 davit_tiny deit_tiny_patch16_224 deit3_small_patch16_224 densenet121 dla34 dla46_c dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_lite0 efficientnet_es tinynet_e
    efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b focalnet_tiny_srf
    gcvit_xxtiny ghostnet_050 ghostnetv2_100 gmixer_24_224 gmlp_ti16_224 hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224
    hrnet_w18_small inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnet_050 levit_128s mambaout_femto
    maxvit_nano_rw_256 coatnet_nano_rw_224 maxvit_tiny_tf_224 mixer_s32_224 mixnet_s mnasnet_small mobilenet_edgetpu_v2_xs
    mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium mobilevit_xxs mobilevitv2_050
    mvitv2_tiny nasnetalarge nest_tiny nextvit_small nf_regnet_b0 nfnet_l0 pit_ti_224 pnasnet5large poolformer_s12
    caformer_s18 convformer_s18 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvit_m0_9
    res2net50_14w_8s resmlp_12_224 resnest14d resnet10t resnetv2_50 resnext26ts rexnet_100 rexnetr_100 sebotnet33ts_256
    selecsls42 semnasnet_050 seresnet18 sequencer2d_s shvit_s1 skresnet18 spnasnet_100 starnet_s1 swiftformer_xs
    swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tf_mobilenetv3_small_minimal_100
    tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small vgg11 visformer_tiny
    vit_tiny_patch16_224 vit_relpos_small_patch16_224 vit_medium_patch16_gap_256 vitamin_small_224 volo_d1_224 vovnet39a
    wide_resnet50_2 xception41 xcit_nano_12_p16_224 legacy_xception convnext_tiny_hnf sam2_hiera_tiny vit_small_patch16_dinov3
""".split()


def build(name: str) -> tuple[Any, tuple[int, ...]]:
    """A model with random weights, and the input shape of its zoo."""
    zoo, _, model_name = name.rpartition(":")
    if zoo == "timm":
        import timm

        model = timm.create_model(model_name, pretrained=False)
        return model.eval(), (1, *model.pretrained_cfg["input_size"])
    import torchvision

    if model_name.startswith(("lraspp", "deeplab", "fcn")):
        model = torchvision.models.get_model(model_name, weights=None, weights_backbone=None)
        return model.eval(), (1, 3, 224, 224)
    if model_name.startswith("ssdlite"):
        model = torchvision.models.get_model(model_name, weights=None, weights_backbone=None)
        return backbone_and_head(model).eval(), (1, 3, 320, 320)
    options = {"init_weights": False} if model_name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(model_name, weights=None, **options)
    return model.eval(), (1, 3, 299, 299) if model_name == "inception_v3" else (1, 3, 224, 224)


def backbone_and_head(detector: Any) -> Any:
    """What of a torchvision detector is a network: several feature maps and the heads on them, without boxes and anchors."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = detector.backbone, detector.head

        def forward(self, x: Any) -> Any:
            return self.head(list(self.backbone(x).values()))

    return Network()


def half(program: Any, seed: int) -> dict[str, list[int]]:
    """About half the channels of every prunable group, at random."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return {g.name: sorted(generator.choice(g.width, max(1, g.width // 2), replace=False).tolist()) for g in program.prunable}


def ours(name: str) -> dict[str, Any]:
    """One model through trace, cut, proof, forward and backward."""
    import torch

    from toolkit.graph import apply, example_input, prove
    from toolkit.graph.program import analyse
    from toolkit.graph.tracing import capture

    torch.manual_seed(0)
    model, shape = build(name)
    example = example_input(shape)
    clock = time.process_time
    start = clock()
    captured = capture(model, example)
    exported = clock()
    program = analyse(*captured)
    grouped = clock()
    plan = half(program, 0)
    sliced = apply(program, plan)
    cut = clock()
    del model
    found: dict[str, Any] = {
        "groups": len(program.groups),
        "prunable_groups": len(program.prunable),
        "kinds": {kind: sum(g.kind == kind for g in program.prunable) for kind in sorted({g.kind for g in program.prunable})},
        "prunable_macs_share": program.prunable_macs_share(),
        "macs": program.macs(),
        "macs_left": sliced.macs(),
        "parameters": program.parameter_count(),
        "parameters_left": sliced.parameter_count(),
        "held": {g.reason: sum(o.reason == g.reason for o in program.groups) for g in program.groups if not g.prunable},
        "export_s": exported - start,
        "grouping_s": grouped - exported,
        "surgery_s": cut - grouped,
    }
    start = clock()
    found["proof_error"] = prove(program, sliced, plan)
    found["proof_s"] = clock() - start
    del program
    output = sliced.module(example if sliced.batch in (None, 1) else example.expand(sliced.batch, *example.shape[1:]))
    tensors = torch.utils._pytree.tree_leaves(output)
    sum(t.float().square().mean() for t in tensors if isinstance(t, torch.Tensor)).backward()
    found["trained_parameters"] = sum(p.grad is not None for p in sliced.module.parameters())
    return found


def torch_pruning(name: str) -> dict[str, Any]:
    """The same model through Torch-Pruning, with nothing told about it."""
    import torch
    import torch_pruning as tp

    torch.manual_seed(0)
    model, shape = build(name)
    example = torch.randn(shape)
    clock = time.process_time
    start = clock()
    before, _ = tp.utils.count_ops_and_params(model, example)
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][-1]
    pruner = tp.pruner.MagnitudePruner(
        model, example, importance=tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=[last]
    )
    pruner.step()
    seconds = clock() - start
    model.zero_grad()
    output = model(example)
    after, _ = tp.utils.count_ops_and_params(model, example)
    sum(t.float().square().mean() for t in torch.utils._pytree.tree_leaves(output)).backward()
    return {"seconds": seconds, "macs": before, "macs_left": after}


def one(name: str, tool: str, limit_s: int) -> dict[str, Any]:
    """A model in a process of its own, which ends itself after `limit_s` CPU seconds."""
    command = [sys.executable, __file__, "--limit", str(limit_s), "--one", name, tool]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == -signal.SIGXCPU:
        return {"error": f"not finished after {limit_s} CPU seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    trouble = done.stderr.strip().splitlines()
    return {"error": trouble[-1][:400] if trouble else f"ended with {done.returncode}"}


def expand(names: list[str]) -> list[str]:
    """`torchvision` and `timm` stand for all classifiers of the one and the list above of the other."""
    found = []
    for name in names:
        if name == "torchvision":
            import torchvision

            found += torchvision.models.list_models(module=torchvision.models)
        elif name == "segmentation":
            found += ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"]
        elif name == "detection":
            found.append("ssdlite320_mobilenet_v3_large")
        elif name == "timm":
            found += [f"timm:{n}" for n in TIMM]
        else:
            found.append(name)
    return found


def line(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{name:44} {found['error'][:150]}"
    if "seconds" in found:
        return f"{name:44} Torch-Pruning {found['seconds']:.1f} s, {found['macs_left'] / found['macs']:.0%} of the MACs left"
    return (
        f"{name:44} {found['prunable_groups']:4}/{found['groups']:<4} groups  {found['prunable_macs_share']:6.1%} prunable"
        f"  error {found['proof_error']:.0e}  export {found['export_s']:.1f}  grouping {found['grouping_s']:.1f}"
        f"  surgery {found['surgery_s']:.1f} s"
    )


def summary(results: dict[str, dict[str, Any]]) -> str:
    done = [r["edgekit"] for r in results.values() if "prunable_macs_share" in r.get("edgekit", {})]
    shares = [r["prunable_macs_share"] for r in done]
    theirs = [r["torch_pruning"] for r in results.values() if "torch_pruning" in r]
    text = f"{len(done)} of {len(results)} models cut and proved"
    if shares:
        text += f"; prunable share median {statistics.median(shares):.1%}, least {min(shares):.1%}"
        cut = [r["grouping_s"] + r["surgery_s"] for r in done]
        whole = [r["grouping_s"] + r["surgery_s"] + r["proof_s"] for r in done]
        text += f"; error {max(r['proof_error'] for r in done):.1e} at most; grouping and surgery {max(cut):.1f} s at most"
        text += f", with the proof {max(whole):.1f} s, over 30 s in {sum(seconds > 30 for seconds in whole)}"
    if theirs:
        both = [(r["edgekit"], r["torch_pruning"]) for r in results.values() if "seconds" in r.get("torch_pruning", {})]
        ours_s, theirs_s = sum(o["grouping_s"] + o["surgery_s"] for o, _ in both), sum(t["seconds"] for _, t in both)
        text += f"; Torch-Pruning {len(both)} of {len(theirs)}, on those CPU seconds {theirs_s:.0f} against {ours_s:.0f}"
        text += f" and {sum(o['export_s'] for o, _ in both):.0f} for torch.export"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names, `torchvision`, `segmentation`, `detection` or `timm`")
    parser.add_argument("-o", "--output", type=Path, help="results as JSON; what it already holds is not done again")
    parser.add_argument("--torch-pruning", action="store_true", help="Torch-Pruning beside it")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default 1: CPU seconds are comparable)")
    parser.add_argument("--limit", type=int, default=600, help="CPU seconds a model may take (default 600)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        resource.setrlimit(resource.RLIMIT_CPU, (options.limit, options.limit + 5))  # SIGXCPU, then SIGKILL
        name, tool = options.one
        print(json.dumps({"edgekit": ours, "torch_pruning": torch_pruning}[tool](name)))
        return 0
    names = expand(options.models)
    if not names:
        parser.error("name a model or a zoo, for example: tools/bench_graph.py torchvision")
    results: dict[str, dict[str, Any]] = {}
    if options.output and options.output.exists():
        results = json.loads(options.output.read_text())["models"]
    tools = ["edgekit", *(["torch_pruning"] if options.torch_pruning else [])]
    wanted = [(name, tool) for name in names for tool in tools if tool not in results.get(name, {})]

    def work(pair: tuple[str, str]) -> None:
        name, tool = pair
        found = one(name, tool, options.limit)
        results.setdefault(name, {})[tool] = found
        print(line(name, found), flush=True)
        if options.output:
            options.output.write_text(json.dumps({"summary": summary(results), "models": results}, indent=1) + "\n")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, wanted))
    print(summary(results))
    return 0 if all("error" not in r["edgekit"] for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
