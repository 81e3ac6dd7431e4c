/** `report`: an image as one HTML page that needs nothing but itself, in light and dark. */

import { exactText, shownText } from '../../text.js'
import type { Facts, Known } from '../facts.js'
import { KINDS, LABELS, STORED } from './allocation.js'
import { fixed, humanSize } from './number.js'
import { REPORT_SCRIPT } from './report-script.js'
import { DARK, drawSvg, LIGHT, xmlText } from './svg.js'

const STYLE = `
:root { color-scheme: light dark; --paper: #fff; --ink: #0f172a; --faint: #64748b; --line: #e2e8f0; --card: #f8fafc; --accent: #0d9488; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f172a; --ink: #f1f5f9; --faint: #94a3b8; --line: #334155; --card: #1e293b; --accent: #2dd4bf; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 ui-sans-serif, system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
.faint { color: var(--faint); }
.bad { color: var(--bad); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin-top: 1.25rem; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.cards b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--faint); font-size: .85rem; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td { overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; margin-right: .5rem; border: 1px solid #94a3b880; vertical-align: -1px; }
#map { display: block; width: 100%; height: 26rem; border: 1px solid var(--line); border-radius: 8px; touch-action: pan-y; }
.bar { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .5rem 0; min-height: 2rem; }
button { font: inherit; padding: .15rem .8rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card); color: inherit; cursor: pointer; }
button:disabled { opacity: .5; cursor: default; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; }
`

export function reportPage(facts: Facts): string {
  const { caption } = facts
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>${xmlText(caption.filename)}</title>
<style>${STYLE}${swatches()}</style>
</head>
<body>
<main>
${header(facts)}
${map(facts)}
${health(facts)}
${chain(facts)}
${snapshots(facts)}
${bitmaps(facts)}
${compaction(facts)}
</main>
<script>const data = ${dataOf(facts)}${REPORT_SCRIPT}</script>
</body>
</html>
`
}

const swatches = (): string => {
  const rules = (colors: typeof LIGHT) => KINDS.map(kind => `.${kind} { background: ${colors[kind]}; }`).join(' ')
  return `${rules(LIGHT)}\n@media (prefers-color-scheme: dark) { ${rules(DARK)} }\n`
}

/** Nothing in it can end the script: names of files and snapshots are not in it. */
const dataOf = ({ runs }: Facts): string =>
  JSON.stringify({
    runs: runs.list(),
    labels: KINDS.map(kind => LABELS[kind]),
    light: KINDS.map(kind => LIGHT[kind]),
    dark: KINDS.map(kind => DARK[kind]),
    stored: STORED.length,
  })

type Cell = string | number | bigint | undefined
const size = (bytes: number | bigint | undefined): string => (bytes === undefined ? '' : humanSize(bytes))
const percent = (part: number, whole: number): string => `${fixed(whole === 0 ? 0 : (100 * part) / whole, 1)} %`

/** Heads that end in a colon are of numbers. */
function table(heads: readonly string[], rows: readonly (readonly Cell[])[]): string {
  const kinds = heads.map(head => (head.endsWith(':') ? ' class="number"' : ''))
  const head = heads.map((text, n) => `<th${kinds[n]}>${text.replace(/:$/, '')}</th>`).join('')
  const body = rows.map(
    row => `<tr>${row.map((cell, n) => `<td${kinds[n]}>${xmlText(String(cell ?? ''))}</td>`).join('')}</tr>`,
  )
  return `<div class="scroll"><table><thead><tr>${head}</tr></thead><tbody>${body.join('\n')}</tbody></table></div>`
}

const card = (label: string, value: string, more = ''): string =>
  `<div><span class="faint">${label}</span><b>${value}</b>${more && `<span class="faint">${more}</span>`}</div>`

function header({ caption, chain: [top], allocation }: Facts): string {
  const { filename, format, virtualSize, clusterSize, fileSize } = caption
  const stored = STORED.reduce((sum, kind) => sum + allocation.totals[kind].bytes, 0)
  const { dirtyFlag, encrypted, formatSpecific, damaged } = top ?? {}
  const marks = [
    dirtyFlag && 'not closed cleanly',
    formatSpecific?.corrupt && 'marked corrupt',
    ...(damaged ?? []).map(({ message }) => message),
  ].filter(mark => typeof mark === 'string')
  return `<h1>${xmlText(filename)}</h1>
<p class="faint">${[format, encrypted && 'encrypted', formatSpecific && `compat ${formatSpecific.compat}`].filter(Boolean).join(' · ')}</p>
${marks.map(mark => `<p class="bad">${xmlText(mark)}</p>`).join('')}
<div class="cards">
${card('Disk', size(virtualSize), `${virtualSize} bytes`)}
${card('Data', size(stored), `${percent(stored, virtualSize)} of the disk`)}
${card('On the file system', size(fileSize) || 'not told', top === undefined ? '' : `file of ${size(top.fileLength)}`)}
${clusterSize === undefined ? '' : card('Cluster', size(clusterSize))}
</div>`
}

function map({ allocation, caption, layout, runs }: Facts): string {
  const { length } = allocation.grid
  const kinds = allocation.present.map(kind => {
    const { bytes, extents } = allocation.totals[kind]
    const name = `<span class="swatch ${kind}"></span>${LABELS[kind]}`
    return `<tr><td>${name}</td><td class="number">${size(bytes)}</td><td class="number">${percent(bytes, length)}</td><td class="number">${extents}</td></tr>`
  })
  const svg = Buffer.from(shownText(drawSvg(allocation, caption, layout))).toString('base64')
  const coarse =
    runs.cellBytes === 0 ? '' : ` There are very many extents: each cell of ${size(runs.cellBytes)} is shown as one.`
  return `<h2>Allocation</h2>
<p class="faint">From the upper left to the lower right. Zoom with the wheel, a double click, + and −; move with the arrow keys.${coarse}</p>
<div class="bar"><button id="in">Closer</button><button id="out">Further</button><button id="all">All</button><span id="range" class="faint"></span></div>
<canvas id="map" tabindex="0" role="img" aria-label="Allocation of the disk; the table below has the sums"></canvas>
<p id="tip" class="bar" aria-live="polite"></p>
<div class="scroll"><table><thead><tr><th>What</th><th class="number">Bytes</th><th class="number">Of the disk</th><th class="number">Extents</th></tr></thead><tbody>
${kinds.join('\n')}
</tbody></table></div>
<details><summary>As a picture${layout === undefined || layout.empty ? '' : ', with the place in the file'}</summary><p><img alt="Allocation as a picture" src="data:image/svg+xml;base64,${svg}"></p></details>`
}

const unknown = (heading: string, { why }: { readonly why: string }): string =>
  `<h2>${heading}</h2>\n<p class="faint">Not known: ${xmlText(why)}.</p>`

const isUnknown = <T>(fact: Known<T>): fact is { readonly why: string } => 'why' in fact

function health({ check }: Facts): string {
  if (isUnknown(check)) return unknown('Consistency and fragmentation', check)
  const { corruptions, leaks, checkErrors, allocatedClusters, fragmentedClusters, compressedClusters, totalClusters } =
    check.value
  const found = check.value.findings.slice(0, 20).map(({ severity, code, message }) => [severity, code, message])
  const verdict = check.value.ok
    ? '<p>No errors were found.</p>'
    : `<p class="bad">${corruptions} corruptions, ${leaks} leaked clusters, ${checkErrors} places that could not be looked at</p>`
  return `<h2>Consistency and fragmentation</h2>
${verdict}
${found.length === 0 ? '' : table(['Severity', 'Code', 'What'], found)}
<div class="cards">
${card('Allocated clusters', String(allocatedClusters), `${percent(allocatedClusters, totalClusters)} of ${totalClusters}`)}
${card('Fragmented', percent(fragmentedClusters, allocatedClusters), `${fragmentedClusters} do not follow their neighbour`)}
${card('Compressed', percent(compressedClusters, allocatedClusters), `${compressedClusters} clusters`)}
</div>`
}

function chain({ chain }: Facts): string {
  const rows = chain.map((layer, depth) => [
    depth,
    exactText(layer.filename, layer.filenameBytes),
    layer.format,
    size(layer.virtualSize),
    size(layer.fileLength),
    size(layer.actualSize),
    layer.backingFilename === undefined ? '' : exactText(layer.backingFilename, layer.backingFilenameBytes),
  ])
  const heads = [
    'Depth:',
    'File',
    'Format',
    'Disk:',
    'File length:',
    'On the file system:',
    'Names as its backing file',
  ]
  return `<h2>Chain</h2>\n${table(heads, rows)}`
}

function snapshots({ snapshots, alone }: Facts): string {
  if (snapshots.length === 0) return '<h2>Snapshots</h2>\n<p class="faint">There are none.</p>'
  const shares = isUnknown(alone) ? undefined : alone.value
  const rows = snapshots.map(({ id, name, dateSec, vmStateSize }, n) => [
    id,
    name,
    new Date(1000 * dateSec).toISOString().replace('T', ' ').replace('.000Z', ' UTC'),
    vmStateSize === 0 ? '' : size(vmStateSize),
    shares === undefined ? '' : size(shares.views[n] ?? 0),
  ])
  const disk = ['', 'the disk itself', '', '', shares === undefined ? '' : size(shares.views[snapshots.length] ?? 0)]
  const note = isUnknown(alone)
    ? `What each holds alone is not known: ${xmlText(alone.why)}.`
    : `${size(alone.value.shared)} are held by several. What one holds alone is what deleting it frees.${alone.value.compressed ? ' Compressed data is not counted.' : ''}`
  return `<h2>Snapshots</h2>\n${table(['Id', 'Name', 'Made', 'Machine state:', 'Holds alone:'], [...rows, disk])}\n<p class="faint">${note}</p>`
}

function bitmaps({ bitmaps, caption }: Facts): string {
  if (bitmaps.length === 0) return '<h2>Bitmaps</h2>\n<p class="faint">There are none.</p>'
  const rows = bitmaps.map(({ name, granularity, flags, dirty }) => [
    name,
    flags.includes('in-use') ? 'inconsistent' : flags.includes('auto') ? 'recording' : 'disabled',
    size(granularity),
    size(dirty),
    dirty === undefined ? '' : percent(dirty, caption.virtualSize),
  ])
  return `<h2>Bitmaps</h2>\n${table(['Name', 'State', 'Granularity:', 'Dirty:', 'Of the disk:'], rows)}`
}

function compaction({ compact }: Facts): string {
  if (isUnknown(compact)) return unknown('What compacting would win', compact)
  const rows = compact.value.map((result, n) => [
    n === 0 ? 'qcow2 compact' : 'qcow2 compact --rewrite',
    size(result.reclaimedBytes),
    `${size(result.actualSizeBefore)} → ${size(result.actualSizeAfter)}`,
    `${size(result.fileLengthBefore)} → ${size(result.fileLengthAfter)}`,
    n === 0 ? '' : `${result.movedClusters} clusters are moved`,
  ])
  return `<h2>What compacting would win</h2>\n${table(['Command', 'Reclaims:', 'On the file system:', 'File length:', ''], rows)}
<p class="faint">With <code>--zeroes</code> clusters of nothing but zeroes go, too: that takes reading all data, which this report does not.</p>`
}
