"""The list of tests that do not apply, and how outcomes are compared with it; ``make conformance`` runs the suites."""

from __future__ import annotations

from tools.conformance import SUITES, Exempt, Outcome, compare, models_of, read_list, read_report

REPORT = """<testsuites><testsuite>
<testcase classname="tests.api_resources.chat.test_completions.TestCompletions" name="test_a[strict]"/>
<testcase classname="tests.api_resources.test_models.TestAsyncModels" name="test_b[loose]">
  <failure message="openai.NotFoundError: 404">at line 3</failure></testcase>
<testcase classname="tests.api_resources.test_models.TestModels" name="test_c"><skipped message="not now"/></testcase>
<testcase classname="tests.api_resources.test_models.TestModels" name="test_d"><error message="no fixture"/></testcase>
</testsuite></testsuites>"""


def outcome(test: str, failure: str | None = None) -> Outcome:
    return Outcome("openai", "test_models.py", test, "TestModels, strict", failure)


def exempt(*tests: str, says: str = "405") -> Exempt:
    return Exempt("openai", "test_models.py", tests, "models cannot be deleted", says)


def test_a_report_is_read() -> None:
    passed, failed, skipped, broken = read_report("openai", REPORT)
    assert passed == Outcome("openai", "chat/test_completions.py", "test_a", "TestCompletions, strict", None)
    assert (failed.file, failed.test, failed.case) == ("test_models.py", "test_b", "TestAsyncModels, loose")
    assert failed.failure == "failure: openai.NotFoundError: 404 at line 3"
    assert (skipped.failure or "").startswith("skipped: not now")
    assert (broken.failure or "").startswith("error: no fixture")


def test_what_is_as_listed_is_no_news() -> None:
    assert compare([outcome("a"), outcome("b", "Error code: 405")], [exempt("b")]) == []


def test_each_difference_is_told() -> None:
    (line,) = compare([outcome("a", "boom\nat line 3")], [])
    assert line == "FAILED  openai test_models.py a (TestModels, strict): boom"
    (line,) = compare([outcome("a")], [exempt("a")])
    assert line == "PASSED  openai test_models.py a (TestModels, strict), but it is listed: models cannot be deleted"
    (line,) = compare([outcome("a", "Error code: 500")], [exempt("a")])
    assert line == "FAILED  openai test_models.py a (TestModels, strict), but not with '405': Error code: 500"
    (line,) = compare([outcome("a")], [exempt("gone")])
    assert line == "MISSING openai test_models.py gone is listed and does not exist"


def test_one_case_that_passes_is_enough_to_be_told() -> None:
    assert len(compare([outcome("a", "405"), outcome("a")], [exempt("a")])) == 1


def test_the_list_names_tests_of_the_suites_once_and_with_reasons() -> None:
    files = {(suite.package, file) for suite in SUITES for file in suite.files}
    entries = read_list()
    assert {(entry.suite, entry.file) for entry in entries} <= files
    names = [(entry.suite, entry.file, test) for entry in entries for test in entry.tests]
    assert len(names) == len(set(names))
    assert all(len(entry.reason) > 20 and len(entry.says) > 4 for entry in entries)


def test_the_models_that_tests_ask_for_are_found() -> None:
    text = """
        client.chat.completions.create(model="gpt-a", moderation={"model": "model"})
        client.moderate(model="model")
        client.models.with_raw_response.retrieve(
            "gpt-b",
        )
    """
    assert models_of([text, 'create(model="gpt-a")']) == ["gpt-a", "gpt-b"]
