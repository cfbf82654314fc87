"""epmoe.migrate.scan: import styles of SGLang's versions, scopes, blockers, and files that cannot be scanned."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path
from unittest import mock

import test_sglang_versions

from epmoe import sglang_original
from epmoe._shim.signatures import HELPERS, NAMES
from epmoe.errors import EpmoeError
from epmoe.migrate._scan import sources
from epmoe.migrate.scan import scan

# How layers of each version come by the kernels: imports, and then the launches.
A_CALL = "(down, out, src2dst, ids, weights, first, last, topk, hidden, BLOCK_SIZE=512)"
B_CALL = "(down, out, src2dst, ids, weights, first, last, topk, hidden, 0, BLOCK_SIZE=512)"
LOCAL_CALL = "(down, out, src2dst, ids, weights, topk, hidden, BLOCK_SIZE=512)"
PRE_CALL = "(x, rows, src2dst, ids, scales, first, last, topk, hidden, BLOCK_SIZE=512{flag})"
ACT_CALL = "(gateup, down, gateup.shape[1], order, scales, first, last, BLOCK_SIZE=512)"
FLAG = ", use_per_token_if_dynamic=True"

LAYERS = {
    "0.4.6": (
        f"""
        import torch
        from sglang.srt.layers.moe.ep_moe.kernels import (
            gelu_and_mul_triton_kernel,
            post_reorder_triton_kernel,
            pre_reorder_triton_kernel,
            run_moe_ep_preproess,
            silu_and_mul_triton_kernel,
        )

        class EPMoE(torch.nn.Module):
            def forward(self, x, ids, weights):
                order, src2dst, indptr = run_moe_ep_preproess(ids, self.num_experts)
                pre_reorder_triton_kernel[(x.shape[0],)]{PRE_CALL.format(flag="")}
                if self.activation == "silu":
                    silu_and_mul_triton_kernel[(gateup.shape[0],)]{ACT_CALL}
                else:
                    gelu_and_mul_triton_kernel[(gateup.shape[0],)]{ACT_CALL}
                post_reorder_triton_kernel[(out.size(0),)]{A_CALL}
        """,
        [
            ("run_moe_ep_preproess", ""),
            ("pre_reorder_triton_kernel", ""),
            ("silu_and_mul_triton_kernel", ""),
            ("gelu_and_mul_triton_kernel", ""),
            ("post_reorder_triton_kernel", "A"),
        ],
    ),
    "0.4.7": (
        f"""
        import torch
        from sglang.srt.layers.moe.ep_moe import kernels as moe_kernels
        from sglang.srt.layers.moe.ep_moe.kernels import deepep_permute_triton_kernel as permute
        from sglang.srt.layers.moe.ep_moe.kernels import deepep_run_moe_deep_preprocess

        combine = moe_kernels.post_reorder_triton_kernel

        def forward(x):
            order, src2dst, indptr = deepep_run_moe_deep_preprocess(topk_ids=ids, num_experts=256)
            permute[(x.shape[0],)](x, rows, src2dst, ids, None, topk, hidden, BLOCK_SIZE=512)
            moe_kernels.pre_reorder_triton_kernel[(4,)]{PRE_CALL.format(flag=FLAG)}
            combine[lambda meta: (out.size(0),)]{A_CALL}
            moe_kernels.deepep_post_reorder_triton_kernel[(4,)]{LOCAL_CALL}
        """,
        [
            ("deepep_run_moe_deep_preprocess", ""),
            ("deepep_permute_triton_kernel", ""),
            ("pre_reorder_triton_kernel", ""),
            ("post_reorder_triton_kernel", "A"),
            ("deepep_post_reorder_triton_kernel", ""),
        ],
    ),
    "0.4.9": (
        f"""
        import sglang.srt.layers.moe.ep_moe.kernels
        try:
            from sglang.srt.layers.moe.ep_moe.kernels import ep_gather, ep_scatter
        except ImportError:
            ep_gather = ep_scatter = None

        class Runner:
            combine = sglang.srt.layers.moe.ep_moe.kernels.post_reorder_triton_kernel

            def contiguous(self):
                ep_scatter(x, scale, ids, counts, starts, rows, row_scales, m_indices, index, scale_ue8m0=False)
                ep_gather(rows, ids, weights, index, out)

            def masked(self):
                self.combine[(tokens,)]{B_CALL}
                sglang.srt.layers.moe.ep_moe.kernels.silu_and_mul_triton_kernel[(rows,)]{ACT_CALL}
        """,
        [
            ("ep_scatter", ""),
            ("ep_gather", ""),
            ("post_reorder_triton_kernel", "B"),
            ("silu_and_mul_triton_kernel", ""),
        ],
    ),
    "0.5.3": (
        f"""
        from sglang.srt.layers.moe.ep_moe.kernels import *

        class Quant:
            def __init__(self):
                from sglang.srt.layers.moe.ep_moe.kernels import pre_reorder_triton_kernel

                self.permute = pre_reorder_triton_kernel

            def forward(self, x):
                self.permute[(x.shape[0],)]{PRE_CALL.format(flag=FLAG)}
                silu_and_mul_masked_post_quant_fwd(gateup, down, scale, 128, masked_m, scale_ue8m0=UE8M0)
                post_reorder_triton_kernel.run{B_CALL[:-1]}, grid=(4,))
        """,
        [
            ("pre_reorder_triton_kernel", ""),
            ("silu_and_mul_masked_post_quant_fwd", ""),
            ("post_reorder_triton_kernel", "B"),
        ],
    ),
    "0.5.15": (
        f"""
        def post_permute(out):
            from sglang.srt.layers.moe.ep_moe.kernels import post_reorder_triton_kernel

            post_reorder_triton_kernel[(out.shape[0],)]{LOCAL_CALL}
        """,
        [("post_reorder_triton_kernel", "D")],
    ),
    "0.5.18": (
        f"""
        try:
            from sglang.kernels.ops.moe.ep_moe_kernels import post_reorder_triton_kernel
        except ImportError:
            from sglang.srt.layers.moe.ep_moe.kernels import post_reorder_triton_kernel
        from sglang.kernels.ops.moe import ep_moe_kernels

        def forward(out):
            post_reorder_triton_kernel[(out.shape[0],)]{LOCAL_CALL}
            ep_moe_kernels.deepep_post_reorder_triton_kernel[(4,)](
                down, out, src2dst, ids, weights, topk, hidden, 2.5, BLOCK_SIZE=512
            )
        """,
        [("post_reorder_triton_kernel", "C or D"), ("deepep_post_reorder_triton_kernel", "")],
    ),
}


def kernels_of(version):
    """A stand-in's kernels, the helpers with SGLang's names for their parameters; their bodies are never run here."""
    text = test_sglang_versions.source(version)
    for name, form in HELPERS.items():
        if len(form.names) > 2:
            text = re.sub(rf"(def {name}\()[^)]*?((?:, scale_ue8m0=False)?\))", rf"\1{', '.join(form.names)}\2", text)
    return text


FROM = "from sglang.srt.layers.moe.ep_moe.kernels import post_reorder_triton_kernel"
LAUNCH = f"post_reorder_triton_kernel[(4,)]{A_CALL}\n"


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name).resolve()
        patch = mock.patch.dict(os.environ)
        patch.start()
        self.addCleanup(patch.stop)
        os.environ.pop("EPMOE_SGLANG", None)

    def put(self, name, text):
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return file

    def scan(self, *paths, **options):
        return scan(paths or [self.root], **options)

    def sites(self, source, **options):
        self.put("layer.py", source)
        report = self.scan(**options)
        self.assertEqual(report["problems"], [])
        return report["sites"]

    def codes(self, source, **options):
        """The blockers of the one site of a source."""
        (site,) = self.sites(source, **options)
        self.assertEqual(site["state"], "blocked" if site["blockers"] else "ready")
        return [each["code"] for each in site["blockers"]]


class Versions(Case):
    def stack(self, version):
        moved = bool(test_sglang_versions.VERSIONS[version].get("moved"))
        kernels = f"sglang/{sglang_original.PATHS[moved]}"
        self.put(kernels, kernels_of(version))
        self.put("sglang/srt/models/layer.py", LAYERS[version][0])
        return kernels

    def test_every_version_s_imports_lead_to_its_kernels(self):
        self.assertGreaterEqual(len(LAYERS), 5)
        for version, (_, expected) in LAYERS.items():
            with self.subTest(version):
                self.setUp()
                self.stack(version)
                report = self.scan()
                self.assertEqual(report["problems"], [])
                found = [(site["kernel"], site["generation"]) for site in report["sites"]]
                if version == "0.5.18":  # the old path is not there, so that one of the two is told by the call alone
                    self.assertEqual([each["code"] for each in report["sites"][0]["blockers"]], ["generation-unknown"])
                    self.assertEqual(report["sites"][1]["state"], "ready")
                else:
                    self.assertEqual({site["state"] for site in report["sites"]}, {"ready"}, report["sites"])
                self.assertEqual(found, expected)

    def test_without_the_definitions_the_calls_tell(self):
        """The same but for generation D, which is launched as C is."""
        for version in ("0.4.6", "0.4.7", "0.4.9", "0.5.3"):
            with self.subTest(version):
                self.setUp()
                self.put("layer.py", LAYERS[version][0])
                report = self.scan()
                self.assertEqual([(each["kernel"], each["generation"]) for each in report["sites"]], LAYERS[version][1])
                self.assertEqual({site["state"] for site in report["sites"]}, {"ready"})

    def test_c_and_d_are_told_apart_by_the_definition_alone(self):
        layer = LAYERS["0.5.15"][0]
        (site,) = self.sites(layer)
        self.assertEqual((site["state"], site["generation"]), ("blocked", "C or D"))
        self.assertEqual(site["blockers"][0]["code"], "generation-unknown")
        self.assertIn("--sglang", site["blockers"][0]["reason"])
        for version, generation, state in (("0.5.15", "D", "ready"), ("0.5.9", "C", "blocked")):
            with self.subTest(version):
                beside = tempfile.TemporaryDirectory()
                self.addCleanup(beside.cleanup)
                package = Path(beside.name) / "sglang"
                file = package / sglang_original.PATHS[0]
                file.parent.mkdir(parents=True)
                file.write_text(test_sglang_versions.source(version))
                for named in (beside.name, package, file):
                    (site,) = self.scan(sglang=named)["sites"]
                    self.assertEqual((site["state"], site["generation"]), (state, generation))
                os.environ["EPMOE_SGLANG"] = beside.name
                (site,) = self.scan()["sites"]
                self.assertEqual((site["state"], site["generation"]), (state, generation))
                del os.environ["EPMOE_SGLANG"]
                if generation == "C":
                    (blocker,) = site["blockers"]
                    self.assertEqual(blocker["code"], "known-wrong")
                    self.assertIn("drops local expert 0", blocker["reason"])

    def test_the_module_of_0_5_16_and_later_has_no_generation_c(self):
        source = (
            f"from sglang.kernels.ops.moe.ep_moe_kernels import post_reorder_triton_kernel as k\nk[g]{LOCAL_CALL}\n"
        )
        (site,) = self.sites(source)
        self.assertEqual((site["state"], site["generation"]), ("ready", "D"))

    def test_two_versions_in_one_tree_answer_for_their_own(self):
        for name, version in (("old", "0.4.6"), ("new", "0.5.15")):
            self.put(f"{name}/sglang/{sglang_original.PATHS[0]}", test_sglang_versions.source(version))
            self.put(f"{name}/sglang/srt/layer.py", FROM + f"\npost_reorder_triton_kernel[(4,)]{LOCAL_CALL}\n")
        old, new = sorted(self.scan()["sites"], key=lambda site: site["file"], reverse=True)
        self.assertEqual((old["generation"], old["state"]), ("A", "blocked"))
        self.assertEqual([each["code"] for each in old["blockers"]], ["arguments"])
        self.assertEqual((new["generation"], new["state"]), ("D", "ready"))


class Names(Case):
    CALL = "[(4,)]" + A_CALL

    def test_ways_to_come_by_a_kernel(self):
        name = "post_reorder_triton_kernel"
        ways = {
            "alias": f"from m import {name} as k\nk",
            "module": f"import m\nm.{name}",
            "module of a package": f"import a.b.m\na.b.m.{name}",
            "module's alias": f"import a.b.m as m\nm.{name}",
            "module by from-import": f"from a.b import m\nm.{name}",
            "relative module": f"from . import m\nm.{name}",
            "relative": f"from ..m import {name}\n{name}",
            "local name": f"from m import {name}\nk = {name}\nk",
            "two steps": f"from m import {name}\nk = {name}\nl = k\nl",
            "a tuple's part": f"from m import {name}, other\nk, o = {name}, other\nk",
            "annotated": f"from m import {name}\nk: object = {name}\nk",
            "walrus": f"from m import {name}\n(k := {name})",
            "name for a module": f"import m\nn = m\nn.{name}",
            "importlib": f"import importlib\nm = importlib.import_module('a.m')\nm.{name}",
            "star": f"from m import *\n{name}",
            "unknown object": f"def f(kernels): kernels.{name}",
            "instance": f"class A:\n    def f(self): self.moe.{name}",
            "conditional": f"if cuda:\n    from m import {name}\nelse:\n    {name} = None\n{name}",
            "guarded": f"try:\n    from m import {name}\nexcept ImportError:\n    from n import {name}\n{name}",
            "same or same": f"from m import {name} as a, {name} as b\n(a if new else b)",
            "global": f"def load():\n    global {name}\n    from m import {name}\n{name}",
            "class body": f"class A:\n    from m import {name}\n    def f(self): self.{name}",
            "inner function": f"def f():\n    from m import {name}\n    def g(): return {name}",
            "comprehension": f"from m import {name}\n[{name}",
            "with a comment": f"from m import {name}\n(  # which\n    {name})",
            "defined here": f"@triton.jit\ndef {name}(d, o, s, i, w, start_expert_id, end_expert_id, topk, hidden_size,"
            f" BLOCK_SIZE): pass\n{name}",
            "unicode before it": f"from m import {name}\nä = 'ö😀'; {name}",
        }
        for what, source in ways.items():
            with self.subTest(what):
                end = " for _ in r]" if what == "comprehension" else ""
                (site,) = self.sites(f"{source}{self.CALL}{end}\n")
                self.assertEqual((site["kernel"], site["kind"], site["generation"]), (name, "launch", "A"))
                self.assertEqual((site["state"], site["blockers"]), ("ready", []))

    def test_line_column_and_arguments(self):
        (site,) = self.sites(
            "from m import post_reorder_triton_kernel as k\nif 1:\n\tä = 'ö😀'; "
            "k[(4,)](d , o,\n s2d,ids  ,w[ 0 ], 1,\\\n 8, topk = 2, hidden_size=H,\n BLOCK_SIZE=64, num_warps=8)\n"
        )
        self.assertEqual((site["line"], site["column"], site["callee"], site["module"]), (3, 12, "k", "m"))
        mapped = {each["argument"]: each["value"] for each in site["arguments"] if each["argument"]}
        self.assertEqual(
            mapped,
            {
                "down_output": "d",
                "output": "o",
                "src2dst": "s2d",
                "topk_ids": "ids",
                "topk_weights": "w[ 0 ]",
                "start_expert_id": "1",
                "end_expert_id": "8",
            },
        )
        rest = {each["parameter"]: each["value"] for each in site["arguments"] if not each["argument"]}
        self.assertEqual(rest, {"topk": "2", "hidden_size": "H", "BLOCK_SIZE": "64"})

    def test_names_through_other_files(self):
        self.put("pkg/kernels.py", test_sglang_versions.source("0.4.9"))
        self.put("pkg/__init__.py", "from .kernels import post_reorder_triton_kernel\nfrom .middle import combine\n")
        self.put("pkg/middle.py", "from .kernels import post_reorder_triton_kernel as first\ncombine = first\n")
        self.put("one.py", f"from pkg import post_reorder_triton_kernel\npost_reorder_triton_kernel[g]{B_CALL}\n")
        self.put("two.py", f"import pkg.middle\npkg.middle.combine[g]{B_CALL}\n")
        self.put("three.py", f"from pkg import combine as final\nfinal[g]{B_CALL}\n")
        self.put("other.py", f"from elsewhere import combine\ncombine[g]{B_CALL}\n")
        found = {Path(site["file"]).name: site for site in self.scan()["sites"]}
        self.assertEqual(set(found), {"one.py", "two.py", "three.py"})
        for site in found.values():
            self.assertEqual((site["kernel"], site["generation"]), ("post_reorder_triton_kernel", "B"))
            self.assertEqual(site["definition"], str(self.root / "pkg/kernels.py"))
            self.assertEqual(site["state"], "ready")

    def test_what_is_no_site(self):
        name = "post_reorder_triton_kernel"
        sources = {
            "strings, comments": f"from m import {name}\n# {name}[(4,)]{A_CALL}\nx = '{name}[(4,)]{A_CALL}'\n",
            "docstring": f'"""{LAUNCH}"""\n__all__ = ["{name}"]\n',
            "parameter": f"{FROM}\ndef f({name}): {LAUNCH}",
            "keyword parameter": f"{FROM}\ndef f(*, {name}=None): {LAUNCH}",
            "star parameter": f"{FROM}\ndef f(*{name}): {LAUNCH}",
            "lambda": f"{FROM}\nf = lambda {name}: {LAUNCH}",
            "local variable": f"{FROM}\ndef f():\n    {name} = make()\n    {LAUNCH}",
            "assigned afterwards": f"{FROM}\ndef f():\n    {LAUNCH}    {name} = make()\n",
            "for": f"{FROM}\ndef f():\n    for {name} in all_of_them:\n        {LAUNCH}",
            "with": f"{FROM}\ndef f():\n    with make() as {name}: {LAUNCH}",
            "except": f"{FROM}\ndef f():\n    try: pass\n    except E as {name}: {LAUNCH}",
            "match": f"{FROM}\ndef f(x):\n    match x:\n        case [{name}, *_]: {LAUNCH}",
            "comprehension": f"{FROM}\nx = [{LAUNCH.strip()} for {name} in y]\n",
            "walrus in a comprehension": f"{FROM}\ndef f(): return [({name} := g()) for _ in y], {LAUNCH}",
            "inner def": f"{FROM}\ndef f():\n    def g(): pass\n    g[1]({name}=1)\n",
            "nonlocal": f"{FROM}\ndef f():\n    {name} = g()\n    def h():\n        nonlocal {name}\n        {LAUNCH}",
            "other import in between": f"{FROM}\ndef f():\n    from n import other as {name}\n    {LAUNCH}",
            "class scope is not its methods'": "class A:\n    from m import ep_gather\n"
            "    def f(self): ep_gather(a, b, c, d, e)\n",
            "guards": f"{FROM}\nif {name} is None or not {name}: pass\nassert {name}\nif {name}: pass\n",
            "attributes": f"{FROM}\n{name}.fn.__doc__, {name}.cache\n",
            "device code": f"{FROM}\n@triton.jit\ndef k(a):\n    {name}(a)\n",
            "epmoe's own": "import epmoe, torch\nepmoe.ep_gather(a)\ntorch.ops.epmoe.ep_gather(a, b, c, d, e)\n"
            "from epmoe.generated import ep_scatter\nep_scatter(a)\n",
            "other people's methods": "class A:\n    def ep_gather(self, x): return x\n"
            "    def f(self): return self.ep_gather(1)\nA().ep_gather(2)\nself.group.ep_scatter(x)\n",
            "other people's functions": "def ep_gather(values, group): pass\nep_gather(v, g)\n",
            "a name not bound, called": "ep_gather(a, b, c, d, e)\n",
        }
        for what, source in sources.items():
            with self.subTest(what):
                self.assertEqual(self.sites(source), [])
        # The same without what hides the name is one.
        self.assertEqual(len(self.sites(f"{FROM}\ndef f(other): {LAUNCH}")), 1)
        self.assertEqual(len(self.sites(f"{FROM}\ndef f():\n    other = make()\n    {LAUNCH}")), 1)
        self.assertEqual(len(self.sites("from m import ep_gather\nep_gather(a, b, c, d, e)\n")), 1)

    def test_migrated_sites(self):
        for source in (
            f"{FROM}\nfrom epmoe.shim import drop_in\ndrop_in(post_reorder_triton_kernel)[(4,)](*args)\n",
            f"{FROM} as k\nfrom epmoe import shim\nk = shim.drop_in(k)\nk[(4,)]{A_CALL}\n",
            f"import epmoe.shim as s, m\ns.drop_in(m.post_reorder_triton_kernel)[(4,)]{A_CALL}\n",
            f"from epmoe.shim import post_reorder_triton_kernel\n{LAUNCH}",
            f"from epmoe import shim\nshim.post_reorder_triton_kernel[(4,)]{A_CALL}\n",
            f"{FROM}\nfrom epmoe.shim import drop_in as d\nuse(d(post_reorder_triton_kernel))\n",
        ):
            with self.subTest(source):
                sites = self.sites(source)
                self.assertEqual([site["state"] for site in sites], ["migrated"], sites)
                self.assertEqual(sites[0]["blockers"], [])
        (site,) = self.sites(f"{FROM}\nfrom mine import drop_in\ndrop_in(post_reorder_triton_kernel)[(4,)]{A_CALL}\n")
        self.assertEqual(site["state"], "blocked")


class Blockers(Case):
    def test_each(self):
        name = "post_reorder_triton_kernel"
        c = test_sglang_versions.POST_REORDER.format(**test_sglang_versions.GENERATIONS["C"])
        odd = "@triton.jit\ndef post_reorder_triton_kernel(down, out, hidden_size): pass\n"
        sources = {
            "star-arguments": f"{FROM}\n{name}[(4,)](*args, BLOCK_SIZE=512)\n",
            "star-arguments ": f"{FROM}\n{name}[(4,)](down, out, **sizes)\n",
            "star-arguments  ": "from m import ep_gather\nep_gather(*args)\n",
            "unknown-signature": f"{FROM}\n{name}[(4,)](down, out, src2dst)\n",
            "unknown-signature ": f"{FROM}\n{name}[(4,)]{A_CALL[:-1]}, SPLIT=2)\n",
            "unknown-signature  ": f"{odd}{name}[(4,)](a, b, c)\n",
            "unknown-signature   ": "def ep_gather(input_tensor, weights): pass\nep_gather(a, b)\n",
            "known-wrong": f"{textwrap.dedent(c)}\n{name}[(4,)]{LOCAL_CALL}\n",
            "generation-unknown": f"{FROM}\n{name}[(4,)]{LOCAL_CALL}\n",
            "arguments": "from m import ep_gather\nep_gather(a, b)\n",
            "arguments ": "from m import ep_gather\nep_gather(a, b, c, d, e, f)\n",
            "arguments  ": "from m import ep_gather\nep_gather(a, b, c, d, e, input_tensor=a)\n",
            "arguments   ": "from m import ep_gather\nep_gather(a, b, c, d, e, block=1)\n",
            "refused-value": "from m import ep_scatter\nep_scatter(a, b, c, d, e, f, g, h, i, scale_ue8m0=True)\n",
            "grid": f"{FROM}\n{name}[(4, 2)]{A_CALL}\n",
            "partial": f"import functools\n{FROM}\nf = functools.partial({name}[(4,)], BLOCK_SIZE=512)\n",
            "partial ": "from functools import partial as p\nfrom m import ep_gather\nf = p(ep_gather, a)\n",
            "taken-as-value": f"{FROM}\nlaunch({name})\n",
            "taken-as-value ": f"{FROM}\nkernels = [{name}]\n",
            "taken-as-value  ": f"{FROM}\ndef f(kernel={name}): kernel[(4,)](1)\n",
            "taken-as-value   ": f"{FROM}\nholder.kernel = {name}\n",
            "taken-as-value    ": f"{FROM}\nlauncher = {name}[(4,)]\n",
            "taken-as-value     ": f"{FROM}\ndef f(): return {name}\n",
            "rebound": f"{FROM}\n{name} = wrap()\n{LAUNCH}",
            "rebound ": f"{FROM} as k\nk = other\nk[(4,)]{A_CALL}\n",
            "rebound  ": f"try:\n    {FROM} as k\nexcept E:\n    def k(): pass\nk[(4,)]{A_CALL}\n",
            "rebound   ": f"{FROM} as k\nfrom n import other as k\nk[(4,)]{A_CALL}\n",
            "several-kernels": f"{FROM}\nfrom m import deepep_post_reorder_triton_kernel as e\n"
            f"k = {name} if old else e\nk[(4,)]{A_CALL}\n",
            "unbound": LAUNCH,
            "device-code": f"{FROM}\n@triton.jit\ndef outer(a):\n    {LAUNCH}",
            "f-string": f"{FROM}\nx = f'{{{LAUNCH.strip()}}}'\n",
        }
        for code, source in sources.items():
            with self.subTest(code):
                found = self.codes(source)
                self.assertIn(code.strip(), found)
                if code.strip() != "several-kernels":  # which of the two takes these arguments is one of its points
                    self.assertEqual(len(found), 1, found)
        documented = re.findall(r"^  \| '([a-z-]+)'$", (ROOT / "src/migrate/scan.ts").read_text(), re.MULTILINE)
        self.assertEqual(sorted({code.strip() for code in sources}), sorted(documented))

    def test_what_looks_like_one_and_is_none(self):
        for source in (
            f"{FROM}\npost_reorder_triton_kernel[(4, 1, 1)]{A_CALL}\n",
            f"{FROM}\npost_reorder_triton_kernel[grid]{A_CALL[:-1]}, num_warps=4, num_stages=2)\n",
            "from m import ep_scatter\nep_scatter(a, b, c, d, e, f, g, h, i, scale_ue8m0=False)\n",
            f"{FROM}\nif post_reorder_triton_kernel is not None:\n    {LAUNCH}",
            f"post_reorder_triton_kernel = None\nif cuda:\n    {FROM}\n{LAUNCH}",
        ):
            with self.subTest(source):
                self.assertEqual(self.codes(source), [])

    def test_notes(self):
        (site,) = self.sites("from m import ep_scatter\nep_scatter(a, b, c, d, e, f, g, h, i, scale_ue8m0=UE8M0)\n")
        self.assertEqual(site["notes"], ["goes to Triton where scale_ue8m0 is other than False"])


class Files(Case):
    GOOD = f"{FROM}\n{LAUNCH}"

    def setUp(self):
        super().setUp()
        self.put("good.py", self.GOOD)

    def problems(self, **options):
        report = self.scan(**options)
        self.assertEqual([Path(site["file"]).name for site in report["sites"]], ["good.py"])  # the scan went on
        return [(Path(each["file"]).name, each["kind"], each["harmless"]) for each in report["problems"]]

    def test_what_does_not_parse(self):
        self.put("broken.py", f"def f(:\n    {LAUNCH}")
        self.put("nul.py", self.GOOD.encode() + b"\0")
        self.put("deep.py", f"{FROM}\nx = {'(' * 5000}{')' * 5000}\n")
        self.put("minus.py", f"{FROM}\nx = {'-' * 200_000}1\n")
        self.put("python2.py", f"{FROM}\nprint 'post'\n")
        names = ("broken.py", "deep.py", "minus.py", "nul.py", "python2.py")
        self.assertEqual(self.problems(), [(name, "does-not-parse", False) for name in names])
        (where,) = [each["reason"] for each in self.scan()["problems"] if each["file"].endswith("broken.py")]
        self.assertRegex(where, r"line 1: ")

    def test_names_that_chase_each_other_and_long_chains_end(self):
        swaps = "".join(f"a{n % 40}, a{(n * 7) % 40} = a{(n * 11) % 40}, a{(n * 3) % 40}\n" for n in range(2000))
        chain = "x" + ".add(1)" * 200
        self.put("good.py", f"{FROM}\n{swaps}{LAUNCH}b = {chain}\nc = {'a.' * 90}b\n")
        self.assertEqual(self.problems(), [])

    def test_what_is_broken_and_mentions_no_kernel_is_not_ours(self):
        self.put("broken.py", "def f(:\n")
        self.put("binary.py", bytes(range(256)))
        self.assertEqual(self.problems(), [])

    def test_encodings(self):
        self.put("latin.py", "# ä\n".encode("latin-1") + self.GOOD.encode())
        self.put("wrong.py", b"# coding: no-such\n" + self.GOOD.encode())
        self.put("utf16.py", self.GOOD.encode("utf-16"))
        self.put("mark.py", b"\xef\xbb\xbf# coding: latin-1\n" + self.GOOD.encode())
        found = self.problems()
        self.assertEqual(found, [(name, "not-text", False) for name in ("latin.py", "mark.py", "wrong.py")])
        os.unlink(self.root / "good.py")
        self.put("declared.py", "# coding: latin-1\n# ä\n".encode("latin-1") + self.GOOD.encode())
        self.put("bom.py", b"\xef\xbb\xbf" + self.GOOD.encode())
        self.assertEqual([Path(each["file"]).name for each in self.scan()["sites"]], ["bom.py", "declared.py"])

    def test_links(self):
        (self.root / "self.py").symlink_to("self.py")
        (self.root / "loop").symlink_to("loop")
        (self.root / "nothing.py").symlink_to("gone.py")
        (self.root / "folder").mkdir()
        (self.root / "folder/up").symlink_to("..")
        (self.root / "again.py").symlink_to("good.py")
        found = self.scan()
        self.assertEqual(len(found["sites"]), 1)
        self.assertEqual(
            sorted((Path(each["file"]).name, each["kind"], each["harmless"]) for each in found["problems"]),
            [
                ("loop", "symlink-loop", True),
                ("nothing.py", "vanished", True),
                ("self.py", "symlink-loop", True),
                ("up", "symlink-loop", True),
            ],
        )
        outside = tempfile.TemporaryDirectory()
        self.addCleanup(outside.cleanup)
        Path(outside.name, "far.py").write_text(self.GOOD)
        (self.root / "linked").symlink_to(outside.name)
        self.assertEqual(len(self.scan()["sites"]), 2)

    def test_what_is_no_file(self):
        os.mkfifo(self.root / "pipe.py")
        self.assertEqual(self.problems(), [("pipe.py", "not-a-file", True)])
        (self.root / "folder.py").mkdir()
        self.put("folder.py/inner.py", self.GOOD)
        self.assertEqual(len(self.scan()["sites"]), 2)

    def test_huge(self):
        with mock.patch.object(sources, "MAX_BYTES", 1 << 20):
            self.put("table.py", "x = 1\n" * 400_000)
            self.assertEqual(self.problems(), [])
            self.put("huge.py", "x = 1\n" * 400_000 + self.GOOD)
            self.assertEqual(self.problems(), [("huge.py", "too-large", False)])

    def test_what_vanishes_or_cannot_be_read(self):
        self.put("late.py", self.GOOD)
        self.put("secret.py", self.GOOD)
        real = open

        def opening(path, *args, **kwargs):
            if str(path).endswith("late.py"):
                os.unlink(path)
            if str(path).endswith("secret.py"):
                raise PermissionError(13, "Permission denied")
            return real(path, *args, **kwargs)

        with mock.patch.object(sources, "open", opening, create=True):
            self.assertEqual(self.problems(), [("late.py", "vanished", True), ("secret.py", "unreadable", False)])

    def test_what_is_left_out_unless_named(self):
        for place in (".hidden", "__pycache__", "node_modules", "venv/lib"):
            self.put(f"{place}/inner.py", self.GOOD)
        self.put("venv/pyvenv.cfg", "home = /usr/bin\n")
        self.put("script", self.GOOD)
        self.assertEqual(self.scan()["files"]["seen"], 1)
        for named in (".hidden", "__pycache__", "venv", "venv/lib", "script"):
            self.assertEqual(len(self.scan(self.root / named)["sites"]), 1, named)

    def test_the_same_file_twice_is_once(self):
        self.assertEqual(len(self.scan(self.root, self.root / "good.py", self.root)["sites"]), 1)

    def test_wrong_usage(self):
        for paths, options in (([], {}), ([self.root / "none"], {}), ([self.root], {"action": "delete"})):
            with self.assertRaises(EpmoeError) as caught:
                scan(paths, **options)
            self.assertEqual(caught.exception.code, "ERR_USAGE")


ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [
    folder
    for name in ("torch", "triton", "transformers")
    for folder in getattr(importlib.util.find_spec(name), "submodule_search_locations", [])
]


class Large(Case):
    def test_no_site_in_other_people_s_trees(self):
        report = scan(PACKAGES)
        self.assertGreater(report["files"]["seen"], 2000)
        self.assertEqual((report["sites"], report["problems"]), ([], []))
        self.assertEqual(len(self.sites(f"{FROM}\n{LAUNCH}")), 1)

    def test_neither_torch_nor_triton_is_imported_and_nothing_that_is_scanned(self):
        self.put("layer.py", f"raise SystemExit('it was run')\n{FROM}\n{LAUNCH}")
        program = (
            "import sys; from epmoe.migrate.scan import scan\n"
            "print(len(scan([sys.argv[1]], action='write')['changes']))\n"
            "assert not {'torch', 'triton', 'sglang'} & set(sys.modules)"
        )
        run = subprocess.run(
            [sys.executable, "-c", program, str(self.root)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
            capture_output=True,
            text=True,
        )
        self.assertEqual((run.stdout, run.stderr), ("1\n", ""))

    def test_every_name_is_looked_for(self):
        for name in NAMES:
            with self.subTest(name):
                self.assertEqual(len(self.sites(f"from m import {name} as k\nuse(k)\n")), 1)


if __name__ == "__main__":
    unittest.main()
