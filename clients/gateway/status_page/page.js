// Fetches the middle of the page again each second, and changes what has changed, so that what is pointed at or
// selected stays so.  All else is the server's.
(() => {
  "use strict";
  const live = document.getElementById("live"), away = document.getElementById("away");

  const become = (old, now) => {
    if (old.nodeName !== now.nodeName) {
      old.replaceWith(now);
    } else if (old.nodeType === Node.TEXT_NODE) {
      if (old.data !== now.data) old.data = now.data;
    } else {
      for (const { name } of [...old.attributes]) if (!now.hasAttribute(name)) old.removeAttribute(name);
      for (const { name, value } of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
      consistOf(old, now);
    }
  };

  const parts = (node) => [...node.childNodes].filter((child) => child.nodeType !== Node.TEXT_NODE || child.data.trim());

  const consistOf = (old, now) => {
    const had = parts(old), has = parts(now);
    had.slice(has.length).forEach((child) => child.remove());
    has.forEach((child, place) => (place < had.length ? become(had[place], child) : old.append(child)));
  };

  const look = async () => {
    try {
      const answer = await fetch("/status.html", { signal: AbortSignal.timeout(5000) });
      if (!answer.ok) throw new Error(String(answer.status));
      const now = document.createElement("main");
      now.innerHTML = await answer.text();
      consistOf(live, now);
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
