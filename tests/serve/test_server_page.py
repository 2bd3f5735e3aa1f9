"""The page at the server's root, in a real browser."""

import json
import re
import shutil

import httpx
import pytest
from test_api import adapter, opened, serving

from litlora.serve.api import PAGE

__all__ = ["adapter", "opened"]


def test_the_page_reaches_nothing_but_its_server(opened, tmp_path):
    report = tmp_path / "report.html"
    report.write_text("<p>the run's</p>")
    with serving(opened, report=report) as url:
        page = httpx.get(url)
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert '"report": true' in page.text and httpx.get(f"{url}/report").text == "<p>the run's</p>"
    assert not re.search(r"https?://|<link|src=|@import", PAGE.read_text())


@pytest.fixture
def browser():
    """A page of headless Chromium; what it complains of is an error."""
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
    if found is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1200, 800), (380, 740)], ids=["desk", "phone"])
def test_a_chat_in_a_browser(browser, opened, tmp_path, scheme, width, height):
    from playwright.sync_api import expect

    with serving(opened, report=PAGE) as url:
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": height})
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        expect(page.locator("#model0 option")).to_have_count(2)
        assert page.input_value("#model0") == "poet" and page.is_visible("#report")
        page.keyboard.type("What is one?")  # the question has the focus
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("<b>And two?</b>")
        page.keyboard.press("Enter")
        expect(page.locator("article small span:last-child")).to_contain_text("tokens/s", timeout=30_000)
        assert page.text_content(".asked") == "What is one?\n<b>And two?</b>"
        assert page.locator("article").count() == 1

        page.click("#clear")  # the model's context is short
        assert page.locator("article").count() == 0
        page.check("#both")
        page.locator("#strength0").fill("0.5")
        page.click("summary")
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "5")
        page.click("summary")
        page.fill("#question", "And three?")
        page.click("#send")
        speeds = page.locator("article small span:last-child")
        expect(speeds).to_have_text([re.compile("5 tokens, ")] * 2, timeout=30_000)
        labels = page.locator("article small span:first-child").all_text_contents()
        assert labels == ["poet × 0.5", opened.name]
        assert page.evaluate("() => histories.map(one => one.length)") == [2, 2]
        fits = "() => document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert page.evaluate(fits), "nothing lies beside the screen"

        page.click("summary")
        page.fill("#system", "Be brief.")
        page.click("summary")
        page.fill("#question", "Why?")
        page.keyboard.press("Enter")
        refused = page.locator("article.bad p").first
        expect(refused).to_contain_text("no place for tools or a system message", timeout=30_000)
        page.screenshot(path=tmp_path / f"{scheme}-{width}.png")
        print(tmp_path / f"{scheme}-{width}.png")
        assert [one for one in complaints if "400 (Bad Request)" not in one] == []

        page.close()


@pytest.mark.slow
def test_a_conversation_on_the_page_keeps_what_it_should(browser, opened, adapter):
    """After a failure, after New and beside a long name."""
    from playwright.sync_api import expect

    opened.add_adapter("a-very-long-name-" * 6, adapter)
    with serving(opened) as url:
        page = browser.new_page(viewport={"width": 380, "height": 740})
        asked = []

        def answered(route):
            asked.append(route.request.post_data_json["messages"])
            said = asked[-1][-1]["content"]
            if said == "wait":
                return
            pieces = [{"choices": [{"delta": {"content": piece}}]} for piece in ("<b>so", " far")]
            last = {"error": {"message": "the end"}} if said == "fail" else {"choices": []}
            body = "".join(f"data: {json.dumps(event)}\n\n" for event in (*pieces, last))
            route.fulfill(content_type="text/event-stream", body=body)

        page.route("**/v1/chat/completions", answered)
        page.goto(url)
        page.check("#both")
        expect(page.locator("#model1 option")).to_have_count(3)
        fits = "() => document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert page.evaluate(fits), "nothing lies beside the screen"
        page.uncheck("#both")

        def ask(question):
            page.fill("#question", question)
            page.press("#question", "Enter")

        ask("fail")
        expect(page.locator("article.bad p")).to_have_text("<b>so far\n\nthe end")
        expect(page.locator("#question")).to_have_value("fail")
        ask("wait")
        expect(page.locator("#stop")).to_be_enabled()
        page.click("#clear")
        expect(page.locator("#send")).to_be_enabled()
        for question in ("first", "second"):
            ask(question)
            expect(page.locator("#send")).to_be_enabled()
            expect(page.locator("article").last).to_contain_text("<b>so far")
        contents = [[one["content"] for one in messages] for messages in asked]
        assert contents == [["fail"], ["wait"], ["first"], ["first", "<b>so far", "second"]]

        page.set_viewport_size({"width": 380, "height": 400})
        ask("fail")
        expect(page.locator("article.bad")).to_be_visible()
        assert page.evaluate("() => isAtEnd()"), "a failure is seen"
        page.close()
