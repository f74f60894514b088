// Explanations and values under the pointer, the finger and the keyboard. Without this the browser's own titles say them.
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "tooltip");
  document.body.append(tip);
  for (const title of document.querySelectorAll("svg title")) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove();
  }
  for (const element of document.querySelectorAll("[title]")) {
    element.dataset.tip = element.title;
    element.setAttribute("aria-description", element.title);
    element.removeAttribute("title");
  }
  const show = (mark, x, y) => {
    tip.hidden = mark === null;
    if (mark === null) return;
    tip.textContent = mark.dataset.tip;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
    tip.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
  };
  const marked = (event) => (event.target instanceof Element ? event.target.closest("[data-tip]") : null);
  for (const kind of ["pointermove", "pointerdown"]) {
    document.addEventListener(kind, (event) => show(marked(event), event.clientX, event.clientY));
  }
  document.addEventListener("focusin", (event) => {
    const mark = marked(event);
    if (mark === null || !mark.matches(":focus-visible")) return;
    const place = mark.getBoundingClientRect();
    show(mark, place.left, place.bottom - 12);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show(null);
  });
  document.addEventListener("focusout", () => show(null));
  document.addEventListener("scroll", () => show(null), { passive: true });
  // What is folded is printed, too.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
  });
})();
