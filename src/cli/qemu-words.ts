/**
 * What programs under QEMU's names say in place of messages of this program's: who runs QEMU's tools compares their messages to the
 * letter. Under our own name there is more to read.
 */

/** Programs look for no codes, and QEMU has none. */
const CODE = /( \(field [^()]*\))?( \(ERR_[A-Z0-9_]+\))$/

/** What a message is, and what qemu-img says for it. All that fit are said, in this order. */
const QEMU_IMG: readonly (readonly [ours: RegExp, theirs: string])[] = [
  [/: invalid l1_size 0x[0-9a-f]+: the virtual size is too big$/, ': Image is too big'],
  [/: invalid l1_size 0x[0-9a-f]+: the L1 table is too small for the virtual size$/, ': L1 table is too small'],
  [
    /^(Could not create snapshot '.*'): host cluster \d+ has a refcount of \d+, and its references counted once more would exceed .*$/s,
    '$1: Invalid argument',
  ],
  ...[
    [
      /invalid snapshot L1 table offset 0x[0-9a-f]+: .*/,
      'Snapshot L1 table offset invalid',
      'Invalid argument',
    ] as const,
    [/snapshot L1 table of \d+ exceeds the limit of .*/, 'Snapshot L1 table too large', 'File too large'] as const,
  ].flatMap(([ours, theirs, system]): (readonly [RegExp, string])[] => [
    [new RegExp(`^Could not open '.*': ${ours.source}$`, 's'), `Failed to load snapshot: ${theirs}`],
    [
      new RegExp(`^(Could not apply snapshot '.*'): ${ours.source}$`, 's'),
      `${theirs}\n$1: Failed to load snapshot: ${system}`,
    ],
    [new RegExp(`^(Could not delete snapshot '.*'): ${ours.source}$`, 's'), `$1: ${theirs}`],
  ]),
]

const OVERHANGING = 'You can force-remove all $2 overhanging snapshots'
const TABLE = 'failed to read the snapshot table: '
const EXTRA = 'Too much extra metadata in snapshot table entry \\d+'

/** Why a check failed, what qemu-img says of it in front, and the way out that it names. */
const CHECK_FAILURES: readonly (readonly [ours: RegExp, theirs: string, hint: string])[] = [
  [new RegExp(`^(${TABLE}${EXTRA}) \\(.*`), '$1', 'You can force-remove this extra metadata'],
  [new RegExp(`^(${TABLE}Snapshot table is too big): .*last (\\d+) up.*`), '$1', OVERHANGING],
  [/^(snapshot table too large): .*last (\d+) up.*/, '$1', OVERHANGING],
]

/** What the program says of a check that failed: lines in front, and the reason. */
export function spokenCheckFailure(
  reason: string,
  program: string,
): { readonly lines: string; readonly reason: string } {
  const found = program === 'qemu-img' ? CHECK_FAILURES.find(([ours]) => ours.test(reason)) : undefined
  if (found === undefined) return { lines: '', reason }
  const [ours, theirs, hint] = found
  const lines = `${program}: ERROR ${theirs}\n${hint} with ${program} check -r all\n`
  return { lines: reason.replace(ours, lines), reason: 'File too large' }
}

/** A message as the program says it. */
export function spoken(message: string, program: string): string {
  if (!program.startsWith('qemu-')) return message
  const words = program === 'qemu-img' ? QEMU_IMG : []
  return words.reduce((said, [ours, theirs]) => said.replace(ours, theirs), message.replace(CODE, ''))
}
