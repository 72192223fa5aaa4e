// Markdown as DOM nodes. Text only ever becomes text nodes, so HTML shows as it was written; images show as their source.

const INLINE = new RegExp(
  [
    "(`+)(?!`)(.+?)(?<!`)\\1(?!`)", // 1, 2: code
    "\\\\([\\\\`*_{}\\[\\]()#+.!|~<>-])", // 3: escaped
    "(!?\\[)([^\\[\\]\\n]{1,500})\\]\\(([^\\s()<>]{1,2000})\\)", // 4, 5, 6: link or image
    "\\*\\*(?=[^\\s*])(.{0,2000}?[^\\s*])\\*\\*", // 7: bold
    "(?<![\\w*])\\*(?=[^\\s*])([^*\\n]*[^\\s*])\\*(?![\\w*])", // 8: italic, not the product 2*3*4
    "~~(?=\\S)([^~\\n]*\\S)~~", // 9: struck out
  ].join("|"),
  "gsu",
);
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|(\d{1,9})[.)])\s+(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEPTH = 8; // of quotes and lists in each other

/** A fragment that shows the text. */
export function render(text) {
  return blocks(text.split(/\r\n?|\n/), 0);
}

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

function inline(text) {
  const fragment = document.createDocumentFragment();
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, , code, escaped, bracket, label, address, bold, italic, struck] = found;
    fragment.append(text.slice(end, found.index));
    end = found.index + whole.length;
    if (code !== undefined) fragment.append(element("code", code));
    else if (escaped !== undefined) fragment.append(escaped);
    else if (bold !== undefined) fragment.append(element("strong", inline(bold)));
    else if (italic !== undefined) fragment.append(element("em", inline(italic)));
    else if (struck !== undefined) fragment.append(element("del", inline(struck)));
    else if (bracket === "[" && /^https?:\/\//i.test(address)) fragment.append(link(label, address));
    else fragment.append(whole);
  }
  fragment.append(text.slice(end));
  return fragment;
}

function link(label, address) {
  const made = element("a", label);
  made.href = made.title = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}

function blocks(lines, depth) {
  const fragment = document.createDocumentFragment();
  let paragraph = [];
  const finish = () => {
    if (!paragraph.length) return;
    const made = element("p");
    paragraph.forEach((line, index) => made.append(...(index ? [element("br")] : []), inline(line.trim())));
    fragment.append(made);
    paragraph = [];
  };
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    let found;
    if ((found = FENCE.exec(line))) {
      finish();
      const closing = new RegExp(`^ {0,3}${found[1][0]}{${found[1].length},}\\s*$`);
      const code = [];
      for (at++; at < lines.length && !closing.test(lines[at]); at++) code.push(lines[at]);
      at++;
      fragment.append(element("pre", element("code", code.join("\n"))));
    } else if ((found = HEADING.exec(line))) {
      finish();
      fragment.append(element(`h${found[1].length}`, inline(found[2])));
      at++;
    } else if (RULE.test(line)) {
      finish();
      fragment.append(element("hr"));
      at++;
    } else if (depth < DEPTH && QUOTE.test(line)) {
      finish();
      const quoted = [];
      for (; at < lines.length && QUOTE.test(lines[at]); at++) quoted.push(lines[at].replace(QUOTE, ""));
      fragment.append(element("blockquote", blocks(quoted, depth + 1)));
    } else if (depth < DEPTH && (found = ITEM.exec(line)) && found[1].length < 4) {
      finish();
      at = list(lines, at, depth, fragment);
    } else if (line.includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1]) && lines[at + 1].includes("-")) {
      finish();
      const rows = [element("tr", ...cells(line).map((cell) => element("th", inline(cell))))];
      for (at += 2; at < lines.length && lines[at].includes("|"); at++)
        rows.push(element("tr", ...cells(lines[at]).map((cell) => element("td", inline(cell)))));
      const table = element("div", element("table", ...rows));
      table.className = "table";
      fragment.append(table);
    } else {
      if (line.trim()) paragraph.push(line);
      else finish();
      at++;
    }
  }
  finish();
  return fragment;
}

/** Appends the list that begins at a line; returns the first line behind it. */
function list(lines, at, depth, fragment) {
  const first = ITEM.exec(lines[at]);
  const ordered = first[3] !== undefined;
  const made = element(ordered ? "ol" : "ul");
  if (ordered && Number(first[3]) !== 1) made.start = Number(first[3]);
  while (at < lines.length) {
    const found = ITEM.exec(lines[at]);
    if (!found || (found[3] !== undefined) !== ordered || found[1].length > first[1].length + 1) break;
    const content = [found[4]];
    const inside = found[1].length + 2;
    for (at++; at < lines.length; at++) {
      const indent = lines[at].search(/\S/);
      const blank = indent < 0 && at + 1 < lines.length && lines[at + 1].search(/\S/) >= inside;
      if (!blank && indent < inside) break;
      content.push(lines[at].slice(inside));
    }
    const item = blocks(content, depth + 1);
    if (item.firstChild?.localName === "p") item.firstChild.replaceWith(...item.firstChild.childNodes);
    made.append(element("li", item));
    while (at + 1 < lines.length && !lines[at].trim() && ITEM.exec(lines[at + 1])) at++;
  }
  fragment.append(made);
  return at;
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}
