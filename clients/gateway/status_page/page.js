// Fetches the middle of the page again each second, and changes what has changed, so that what is pointed at or
// selected stays so.  All else is the server's.
(() => {
  "use strict";
  const live = document.getElementById("live"), away = document.getElementById("away");

  const become = (old, now) => {
    if (old.nodeName !== now.nodeName || old.childNodes.length !== now.childNodes.length) {
      old.replaceWith(now);
    } else if (old.nodeType === Node.TEXT_NODE) {
      if (old.data !== now.data) old.data = now.data;
    } else {
      for (const { name } of [...old.attributes]) if (!now.hasAttribute(name)) old.removeAttribute(name);
      for (const { name, value } of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
      const children = [...now.childNodes];
      [...old.childNodes].forEach((child, place) => become(child, children[place]));
    }
  };

  const look = async () => {
    try {
      const answer = await fetch("/status.html", { signal: AbortSignal.timeout(5000) });
      if (!answer.ok) throw new Error(String(answer.status));
      const now = live.cloneNode(false);
      now.innerHTML = await answer.text();
      if (now.childNodes.length === live.childNodes.length) become(live, now);
      else live.replaceChildren(...now.childNodes);
      away.hidden = true;
    } catch {
      away.hidden = false;
    }
    live.classList.toggle("stale", !away.hidden);
  };

  const go = async () => {
    if (!document.hidden) await look();
    setTimeout(go, 1000);
  };
  document.addEventListener("visibilitychange", () => document.hidden || look());
  setTimeout(go, 1000);
})();
