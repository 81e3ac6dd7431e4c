// Charts as SVG text, which follow the colour scheme of who looks at them.

const STYLE = `<style>
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-size: 14px; font-weight: 600 }
.quiet { fill: #57606a }
.axis { stroke: #8c959f; stroke-width: 1 }
.s0 { fill: #0969da; stroke: #0969da } .s1 { fill: #bf8700; stroke: #bf8700 } .s2 { fill: #8250df; stroke: #8250df } .s3 { fill: #57606a; stroke: #57606a }
.line { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .quiet { fill: #8b949e } .axis { stroke: #6e7681 }
  .s0 { fill: #58a6ff; stroke: #58a6ff } .s1 { fill: #d29922; stroke: #d29922 } .s2 { fill: #bc8cff; stroke: #bc8cff } .s3 { fill: #8b949e; stroke: #8b949e }
}
</style>`

const escaped = text => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')

const label = (x, y, text, { anchor = 'start', name = '' } = {}) =>
  `<text x="${x}" y="${y}" text-anchor="${anchor}" class="${name}">${escaped(text)}</text>`

const picture = (width, height, title, parts) =>
  [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img">`,
    `<title>${escaped(title)}</title>`,
    STYLE,
    label(12, 22, title, { name: 'title' }),
    ...parts,
    '</svg>\n',
  ].join('\n')

/** What each colour is, in a row below the title. */
const legend = series =>
  series.flatMap((name, at) => [
    `<rect class="s${at}" x="${12 + at * 170}" y="34" width="10" height="10"/>`,
    label(28 + at * 170, 43, name, { name: 'quiet' }),
  ])

/** Bars from the left: `groups` are `{ name, values }`, a value for each of `series` or none; `tell` says what a bar is worth. */
export function bars({ title, series, groups, tell, reference }) {
  // The names are as wide as their letters, about.
  const longest = Math.max(...groups.map(({ name }) => name.length))
  const [width, left, right, thick] = [760, 24 + longest * 7, 80, 14]
  const most = Math.max(...groups.flatMap(({ values }) => values.filter(value => value !== undefined)), reference ?? 0)
  const scale = value => ((width - left - right) * value) / most
  const parts = legend(series)
  let y = 62
  for (const { name, values } of groups) {
    const known = values.map((value, at) => ({ value, at })).filter(({ value }) => value !== undefined)
    parts.push(label(left - 8, y + (known.length * thick) / 2 + 4, name, { anchor: 'end' }))
    for (const { value, at } of known) {
      parts.push(`<rect class="s${at}" x="${left}" y="${y}" width="${scale(value).toFixed(1)}" height="${thick - 3}"/>`)
      parts.push(label(left + scale(value) + 6, y + thick - 4, tell(value), { name: 'quiet' }))
      y += thick
    }
    y += 10
  }
  if (reference !== undefined) {
    const x = left + scale(reference)
    parts.push(`<line class="axis" x1="${x}" x2="${x}" y1="56" y2="${y}" stroke-dasharray="3 3"/>`)
  }
  parts.push(`<line class="axis" x1="${left}" x2="${left}" y1="56" y2="${y}"/>`)
  return picture(width, y + 12, title, parts)
}

/** Lines over names in order, the values on a logarithmic scale: `series` are `{ name, values }`. */
export function curves({ title, names, series, tell }) {
  const [width, height, left, top, right, bottom] = [760, 320, 80, 64, 24, 36]
  const values = series.flatMap(each => each.values.filter(value => value > 0))
  const [low, high] = [Math.floor(Math.log10(Math.min(...values))), Math.ceil(Math.log10(Math.max(...values)))]
  const x = at => left + ((width - left - right) * at) / Math.max(1, names.length - 1)
  const y = value => height - bottom - ((height - top - bottom) * (Math.log10(value) - low)) / Math.max(1, high - low)
  const parts = legend(series.map(({ name }) => name))
  for (let power = low; power <= high; power++) {
    const at = y(10 ** power)
    parts.push(`<line class="axis" x1="${left}" x2="${width - right}" y1="${at}" y2="${at}" stroke-opacity="0.4"/>`)
    parts.push(label(left - 8, at + 4, tell(10 ** power), { anchor: 'end', name: 'quiet' }))
  }
  names.forEach((name, at) => {
    parts.push(label(x(at), height - bottom + 20, name, { anchor: 'middle', name: 'quiet' }))
  })
  series.forEach((each, n) => {
    const points = each.values
      .map((value, at) => [x(at), value > 0 ? y(value) : undefined])
      .filter(([, at]) => at !== undefined)
    parts.push(
      `<polyline class="s${n} line" style="fill: none" points="${points.map(([a, b]) => `${a},${b.toFixed(1)}`).join(' ')}"/>`,
    )
    for (const [a, b] of points) parts.push(`<circle class="s${n}" cx="${a}" cy="${b.toFixed(1)}" r="3"/>`)
  })
  return picture(width, height, title, parts)
}
