// The selector of the worked example; the page is whole without it.
(() => {
  const data = JSON.parse(document.getElementById("example-data").textContent);
  const digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_";
  const tokens = document.querySelectorAll("#tokens i");
  const kept = document.querySelectorAll(".facts .kept");
  const said = document.querySelectorAll(".facts .said");
  const choose = document.getElementById("choose");
  const chosen = {};

  function counts(text) {
    const out = [];
    for (let i = 0; i < text.length; i += data.digits_per_count) {
      let n = 0;
      for (let d = 0; d < data.digits_per_count; d++) n = 64 * n + digits.indexOf(text[i + d]);
      out.push(n);
    }
    return out;
  }

  function show() {
    const text = (data.kept[chosen.method] || {})[chosen.ratio];
    if (text === undefined) return;
    const all = counts(text);
    tokens.forEach((token, i) => {
      const share = Math.min(all[i], data.pairs) / data.pairs;
      const fact = token.classList.contains("f");
      token.className = "k" + Math.ceil(Math.sqrt(share) * 10) + (fact ? " f" : "");
      token.title = all[i] + " of " + data.pairs;
    });
    for (const budget of document.querySelectorAll(".budget"))
      budget.textContent = Math.round(1e6 * chosen.ratio) / 1e4 + "%";
    data.facts.forEach(([start, len], i) => {
      const sum = all.slice(start, start + len).reduce((a, b) => a + b, 0);
      said[i].textContent = data.said[chosen.method][chosen.ratio][i];
      kept[i].textContent = Math.round((100 * sum) / (len * data.pairs)) + "%";
    });
  }

  function press(button) {
    const key = "method" in button.dataset ? "method" : "ratio";
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", other === button);
    chosen[key] = button.dataset[key];
  }

  choose.querySelectorAll("[aria-pressed=true]").forEach(press);
  choose.addEventListener("click", (event) => {
    if (!(event.target instanceof HTMLButtonElement)) return;
    press(event.target);
    show();
  });
  choose.hidden = false;
  show();
})();
