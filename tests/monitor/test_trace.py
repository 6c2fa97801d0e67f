"""Traces show the whole text of a completion and nothing else, in steps, for any text."""

from __future__ import annotations

import math
import re
from array import array
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from browser import browse
from small_tokenizers import crafted, crafted_ids, trained

from step_trl import testbed
from step_trl.advantages import select_step_advantages
from step_trl.report import render_rollout
from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, ProbeRecord, Rollout, SamplingParams
from step_trl.rollout.engines import TransformersEngine
from step_trl.steps import DelimiterSegmenter, TriggerSegmenter


TAGS = {"style", "div", "span", "details", "summary", "code", "b", "br"}
ATTRIBUTES = {"class", "style"}
HOSTILE = (
    "</script><img onerror=alert(1) src=x></details></div></style><script>alert(2)</script> \"'&amp; "
    "<!-- \r\n\x00\x1b\x85 ]]> <b class='text'>Wait</span> https://example.org/x.png"
)


class Reader(HTMLParser):
    """Parses a trace as a browser would: tags, attributes, and the text of each element of a class."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "br":
            self.open.append((tag, (dict(attrs).get("class") or "").split()))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((tuple(name for _, names in self.open for name in names), data))

    def handle_comment(self, data):
        raise AssertionError(f"comment {data!r}")

    handle_decl = handle_pi = unknown_decl = handle_comment

    def inside(self, *names: str) -> str:
        return "".join(text for classes, text in self.texts if set(names) <= set(classes))

    def elements(self, name: str) -> list[list[str]]:
        found = [(attrs.get("class") or "").split() for _, attrs in self.tags]
        return [classes for classes in found if name in classes]


def rollout_of(token_ids, **options) -> Rollout:
    number = len(token_ids)
    return Rollout([], list(token_ids), array("d", [-0.1] * number), [False] * number, **options)


def assert_harmless(html: str) -> None:
    tags = Reader(html).tags
    assert {tag for tag, _ in tags} <= TAGS
    assert {name for _, attributes in tags for name in attributes} <= ATTRIBUTES
    style = r"--share: \d{1,3}%"
    assert all(re.fullmatch(style, a["style"] or "") for _, a in tags if "style" in a)


def labels(html: str) -> list[str]:
    """One per step."""
    found = re.findall(r'<div class="step [^"]*"><div class="label">(.*?)</div><div class="body">', html, re.S)
    return [unescape(re.sub("<[^>]*>", " ", label)) for label in found]


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


@pytest.fixture(scope="module")
def rollouts(tokenizer):
    problems = testbed.load_dataset("train").select(range(12))["prompt"]
    prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]
    engine = TransformersEngine(testbed.load_model(), tokenizer)
    return DynamicTruncatedRollout(engine, [ConfidenceTruncation(tokenizer)], SamplingParams(256)).run(
        prompts, seeds=range(len(prompts))
    )


@pytest.fixture(scope="module")
def truncated(rollouts):
    return next(r for r in rollouts if r.truncated and len(r.probes) > 1)


def test_all_text_of_real_rollouts_is_shown_and_marked(rollouts, tokenizer):
    segmenter = TriggerSegmenter(tokenizer)
    for rollout in rollouts:
        html = render_rollout(rollout, tokenizer).html
        reader = Reader(html)
        assert_harmless(html)
        assert reader.inside("text") == tokenizer.decode(rollout.completion_ids)
        injected = [token for token, flag in zip(rollout.completion_ids, rollout.injected) if flag]
        assert reader.inside("text", "injected") == tokenizer.decode(injected)
        triggers = "".join(
            tokenizer.decode(rollout.completion_ids[a:b]) for a, b in segmenter.occurrences(rollout.completion_ids)
        )
        assert reader.inside("text", "trigger") == triggers
        assert len(reader.elements("exit")) == rollout.truncated
        assert len(reader.elements("probe")) == len(rollout.probes)
        answers = "".join(tokenizer.decode(probe.token_ids) for probe in rollout.probes)
        assert reader.inside("answer") == answers
    assert {rollout.truncated for rollout in rollouts} == {True, False}
    assert {probe.outcome for rollout in rollouts for probe in rollout.probes} == {"exit", "declined", "abandoned"}


def test_probes_and_exit_stand_where_they_happened(truncated, tokenizer):
    texts, seen = Reader(render_rollout(truncated, tokenizer).html).texts, ""
    probes = list(truncated.probes)
    for classes, text in texts:
        if "text" in classes:
            seen += text
        elif text.startswith("probe "):
            probe = probes.pop(0)
            assert seen == tokenizer.decode(truncated.completion_ids[: probe.position])
            confidence = "" if probe.confidence is None else f" · {probe.confidence:.3f}"
            assert text.endswith(f" · {probe.outcome}{confidence}")
        elif "exit" in classes:
            assert seen == tokenizer.decode(truncated.completion_ids[: truncated.injected.index(True)])
    assert not probes


def test_labels_count_tokens_and_leave_out_what_was_not_sampled(truncated, tokenizer):
    spans = TriggerSegmenter(tokenizer).spans(truncated.completion_ids)
    expected = []
    for number, (start, end) in enumerate(spans, 1):
        logps = [x for x in truncated.logprobs[start:end] if not math.isnan(x)]
        confidence = f" · conf. {math.exp(sum(logps) / len(logps)):.3f}" if logps else ""
        expected.append([f"Step {number}", f"tokens: {end - start}{confidence}"])
    found = labels(render_rollout(truncated, tokenizer).html)
    assert [re.split(r"\s{2,}", label.strip()) for label in found] == expected
    assert "conf." not in found[-1]  # injected and greedy only


def test_given_log_probabilities_replace_those_of_the_rollout():
    rollout = rollout_of(crafted_ids("x", "x"))
    html = render_rollout(rollout, crafted(), token_logps=torch.tensor([math.log(0.25), 0.0])).html
    assert "conf. 0.500" in labels(html)[0]
    with pytest.raises(ValueError, match="token_logps: 3 values for 2 tokens"):
        render_rollout(rollout, crafted(), token_logps=[0.0] * 3)


def test_an_exit_that_took_back_its_trigger_shows_its_probe_before_the_closing():
    ids = crafted_ids("x", "\n", "</think>", "y")
    probe = ProbeRecord(2, crafted_ids("a"), [0.0], "exit", 0.99)
    rollout = replace(rollout_of(ids, probes=[probe], truncated=True), injected=[False, True, True, False])
    html = render_rollout(rollout, crafted()).html
    assert html.index(">x<") < html.index('class="probe"') < html.index('class="exit"') < html.index("&lt;/think&gt;")


@pytest.mark.parametrize(("correct", "mark", "word"), [(True, "right", "correct"), (False, "wrong", "not correct")])
def test_problem_solution_and_verdict_stand_above_the_completion(correct, mark, word):
    rollout = rollout_of(crafted_ids("x", "y"))
    html = render_rollout(rollout, crafted(), problem=HOSTILE, solution="<5>", correct=correct).html
    assert_harmless(html)
    reader = Reader(html)
    shown = HOSTILE.translate({13: "\u240d", 0: "\u2400", 27: "\u241b", 0x85: "\ufffd"})
    assert (reader.inside("asked", "problem"), reader.inside("asked", "solution")) == (shown, "<5>")
    assert reader.elements("verdict") == [["verdict", mark]] and reader.inside("verdict") == word
    assert html.index('class="verdict') < html.index("&lt;5&gt;") < html.index('class="step ')


def test_what_is_not_known_is_not_shown():
    reader = Reader(render_rollout(rollout_of(crafted_ids("x")), crafted(), problem="1 + 1").html)
    assert reader.inside("problem") == "1 + 1"
    assert not reader.elements("solution") and not reader.elements("verdict")


def test_hostile_text_stays_text(tmp_path):
    tokenizer = trained()
    ids = tokenizer.encode(HOSTILE)
    probe = ProbeRecord(5, ids, [0.0] * len(ids), "declined", None)
    trace = render_rollout(rollout_of(ids, probes=[probe], truncated=True), tokenizer, title=HOSTILE)
    assert_harmless(trace.html)
    shown = HOSTILE.translate({13: "\u240d", 0: "\u2400", 27: "\u241b", 0x85: "\ufffd"})
    reader = Reader(trace.html)
    assert reader.inside("text") == reader.inside("answer") == reader.inside("head") == shown
    trace.save(tmp_path / "trace.html")
    page = Reader(re.sub("<!doctype html>|<meta[^>]*>", "", (tmp_path / "trace.html").read_text(encoding="utf-8")))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in reader.tags} | {"html", "head", "title", "body"}
    assert shown in [text for _, text in page.texts]


@pytest.mark.parametrize("steps", [None, "🙂"])
def test_characters_that_are_split_over_tokens_or_steps_stay_whole(steps):
    emoji = list("🙂é".encode())
    # "Wait…": its trigger ends inside the token; a delimiter of two bytes ends inside the emoji.
    ids = crafted_ids("x", *emoji, "Wait", *emoji, "y", 0xF0, "x", 0xF0)
    segmenter = None
    if steps is not None:
        segmenter = DelimiterSegmenter(crafted(), steps)
        segmenter._pattern = re.compile(steps.encode()[:2])
        assert any(1 < boundary < 5 for boundary in segmenter.boundaries(ids))
    html = render_rollout(rollout_of(ids), crafted(), segmenter=segmenter).html
    assert Reader(html).inside("text") == crafted().decode(ids) == "x🙂éWait🙂éy\ufffdx\ufffd"


def sas_example(correct: bool):
    """Four steps of a thought, with rising confidence except for the last, and an answer."""
    ids = crafted_ids("a", ".\n\n", "x", ".\n\n", "y", ".\n\n", "it", ".</think>", "x")
    segmenter = DelimiterSegmenter(crafted(), end_text="</think>")
    row = torch.tensor([ids])
    step_ids = segmenter.step_ids(row, torch.ones_like(row))
    logps = torch.tensor([[-3.0, -3.0, -2.0, -2.0, -0.1, -0.1, -1.0, 0.0, 0.0]])
    own = torch.tensor([0.7 if correct else -0.3])
    selected = select_step_advantages(own, logps, step_ids, torch.tensor([correct]), ratio=0.5)
    return rollout_of(ids), segmenter, step_ids[0].tolist(), own, selected[0], logps[0]


@pytest.mark.parametrize("correct", [True, False])
def test_colours_are_those_of_sas(correct):
    rollout, segmenter, step_ids, own, selected, logps = sas_example(correct)
    # The first is a Python number, as a user would type it.
    for advantage in (0.7 if correct else -0.3, own[0]):
        html = render_rollout(
            rollout,
            crafted(),
            segmenter=segmenter,
            advantage=advantage,
            selected_advantages=selected,
            token_logps=logps,
        ).html
        colours = [classes[1] for classes in Reader(html).elements("step")]
        by_hand = ["dropped"] * 2 + ["kept"] * 2 if correct else ["kept"] * 2 + ["rewarded"] * 2
        assert colours == [*by_hand, "kept"]
        values = [float(selected[step_ids.index(step)]) for step in (0, 1, 2, 3, -1)]
        for label, colour, value in zip(labels(html), colours, values, strict=True):
            assert f" {colour}: {value:.3g} " in label
        assert "After the thought" in labels(html)[-1] and "Step 4" in labels(html)[-2]
        assert_harmless(html)


def test_a_step_of_several_credits_is_coloured_by_token():
    rollout = rollout_of(crafted_ids("x", "y", "it"))
    html = render_rollout(rollout, crafted(), advantage=-1.0, selected_advantages=[-1.0, 0.0, 1.0]).html
    reader = Reader(html)
    assert reader.elements("step") == [["step", "mixed"]]
    assert [reader.inside("text", credit) for credit in ("kept", "dropped", "rewarded")] == ["x", "y", "it"]
    zero = render_rollout(rollout, crafted(), advantage=0.0, selected_advantages=[0.0] * 3).html
    assert Reader(zero).elements("step") == [["step", "kept"]]


def test_half_an_advantage_is_refused():
    rollout = rollout_of(crafted_ids("x"))
    with pytest.raises(ValueError, match="only one of them"):
        render_rollout(rollout, crafted(), advantage=1.0)
    with pytest.raises(ValueError, match="selected_advantages: 2 values for 1 tokens"):
        render_rollout(rollout, crafted(), advantage=1.0, selected_advantages=[1.0, 1.0])


def test_an_empty_completion_has_no_steps():
    html = render_rollout(rollout_of([]), crafted()).html
    assert_harmless(html)
    assert "steps: 0" in html and not Reader(html).elements("step")


def test_notebooks_and_wandb_take_it(truncated, tokenizer):
    wandb = pytest.importorskip("wandb")
    trace = render_rollout(truncated, tokenizer)
    assert trace._repr_html_() == trace.html
    assert wandb.Html(trace.html, inject=False).html == trace.html


def colours_of(html: str, scheme: str) -> dict[str, str]:
    light, dark = re.findall(r"\.step-trl-trace \{ (--[^}]*)\}", html)
    found = dict(re.findall(r"--([\w-]+): (#\w{6})", light))
    return found if scheme == "light" else found | dict(re.findall(r"--([\w-]+): (#\w{6})", dark))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme):
    colours = colours_of(render_rollout(rollout_of([]), crafted()).html, scheme)
    fields = ["back", "chip", "kept", "dropped", "rewarded"]
    pairs = [(text, field) for text in ("text", "dim", "injected") for field in fields]
    verdicts = [("right", "back"), ("exit", "back")]
    for front, back in [
        *pairs,
        ("trigger", "trigger-back"),
        ("injected", "trigger-back"),
        ("exit", "chip"),
        *verdicts,
    ]:
        low, high = sorted(luminance(colours[name]) for name in (front, back))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


def test_styles_are_scoped_and_nothing_is_loaded(truncated, tokenizer):
    html = render_rollout(truncated, tokenizer).html
    style = re.search("<style>(.*?)</style>", html, re.S)[1]
    rules = [rule.strip() for rule in re.findall(r"([^{}]+)\{", style)]
    selectors = [selector.strip() + " " for rule in rules for selector in re.split(r",(?![^(]*\))", rule)]
    assert len(selectors) > 10
    assert all(s.startswith((".step-trl-trace ", "@media (prefers-color-scheme: dark) ")) for s in selectors)
    assert not re.search(r"\bsrc\b|href|url\(|@import|https?:|<script|\son\w+=|\sid=", html)


def test_a_browser_shows_it_in_light_and_dark(tmp_path, rollouts, tokenizer):
    from PIL import Image

    longest = max(rollouts, key=lambda rollout: len(rollout.completion_ids))
    trace, page = render_rollout(longest, tokenizer, title="A trace"), tmp_path / "trace.html"
    trace.save(page)
    shots = set()
    for name, scheme in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{name}.png"
        browse(
            page.as_uri(),
            tmp_path / "profile",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={shot}",
        )
        shots.add(shot.read_bytes())
        with Image.open(shot).convert("RGB") as image:
            shown = {f"#{bytes(pixel).hex()}" for _, pixel in image.getcolors(image.width * image.height)}
        colours = colours_of(trace.html, name)
        assert {colours[part] for part in ("back", "kept", "bar", "trigger-back")} <= shown
        assert colours_of(trace.html, "light" if name == "dark" else "dark")["back"] not in shown
    assert len(shots) == 2


def test_a_browser_finds_only_our_elements_in_hostile_text(tmp_path):
    ids = trained().encode(HOSTILE)
    probe = ProbeRecord(5, ids, [0.0] * len(ids), "declined", None)
    page = tmp_path / "trace.html"
    render_rollout(rollout_of(ids, probes=[probe], truncated=True), trained(), title=HOSTILE).save(page)
    dom = re.sub("<!DOCTYPE html>|<meta[^>]*>", "", browse(page.as_uri(), tmp_path / "profile", "--dump-dom"))
    tags = Reader(dom).tags
    assert {tag for tag, _ in tags} <= TAGS | {"html", "head", "title", "body"}
    assert {name for _, attributes in tags for name in attributes} <= ATTRIBUTES | {"lang"}
    assert Reader(dom).inside("text") == HOSTILE.translate({13: "\u240d", 0: "\u2400", 27: "\u241b", 0x85: "\ufffd"})
