/**
 * What programs under QEMU's names say in place of messages of this program's: who runs QEMU's tools compares their messages to the
 * letter. Under our own name there is more to read.
 */

/** Programs look for no codes, and QEMU has none. */
const CODE = /( \(field [^()]*\))?( \(ERR_[A-Z0-9_]+\))$/

/** Why an image is not opened: what a message ends with, and what all of QEMU's programs say there. */
const OPENING: readonly (readonly [ours: RegExp, theirs: string])[] = [
  [/: invalid header_length 0x[0-9a-f]+: the header exceeds the first cluster$/, ': qcow2 header exceeds cluster size'],
  [/: invalid backing_file_offset 0x[0-9a-f]+: [^:]*$/, ': Invalid backing file offset'],
  [/: invalid backing_file_size 0x[0-9a-f]+: longer than [^:]*$/, ': Backing file name too long'],
  [/: invalid header extension length 0x[0-9a-f]+: the extension is larger [^:]*$/, ': Header extension too large'],
  [/: refcount_table_offset of \d+ exceeds the limit of \d+$/, ': Reference count table too large'],
  [/: invalid refcount_table_offset 0x[0-9a-f]+: [^:]*$/, ': Reference count table offset invalid'],
  [/: l1_table_offset of \d+ exceeds the limit of \d+$/, ': Active L1 table too large'],
  [/: invalid l1_table_offset 0x[0-9a-f]+: [^:]*$/, ': Active L1 table offset invalid'],
  [/: the snapshot table is damaged \(nb_snapshots of \d+ exceeds [^()]*\): [^:]*$/, ': Snapshot table too large'],
  [
    /: the snapshot table is damaged \(invalid snapshots_offset 0x[0-9a-f]+: [^()]*\): [^:]*$/,
    ': Snapshot table offset invalid',
  ],
  [
    /: the image is marked corrupt: repair it before writing$/,
    ': qcow2: Image is corrupt; cannot be opened read/write',
  ],
]

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

/** What QEMU says of an image that a request finds corrupt and marks so, by what the library says of it. */
const CORRUPTIONS: readonly (readonly [ours: RegExp, theirs: (...found: string[]) => string])[] = [
  [
    /^the header has a refcount of 0 (\(field L2 table\b)?/,
    (_, table) => `Preventing invalid allocation of ${table === undefined ? 'data cluster' : 'L2 table'} at offset 0`,
  ],
  [
    /^refcount block (\d+): invalid refcount table entry (0x[0-9a-f]+): the refcount block offset is not a multiple/,
    (_, index, offset) => `Refblock offset ${offset} unaligned (reftable index: ${prefixedHex(Number(index))})`,
  ],
  [
    /^a write of guest data would overwrite the (.*): the image is marked corrupt/,
    (_, name = '') => `Preventing invalid write on metadata (overlaps with ${STRUCTURES[name] ?? name})`,
  ],
]

/** Structures of an image by QEMU's names. */
const STRUCTURES: Readonly<Record<string, string>> = {
  header: 'qcow2_header',
  'snapshot L1 table': 'inactive L1 table',
  'L2 table or refcount block': 'active L2 table',
}

const prefixedHex = (value: number): string => (value === 0 ? '0' : `0x${value.toString(16)}`)

/** The line that QEMU prints when a request that failed marked the image corrupt. Undefined where it did not. */
export function corruptionLine(message: string): string | undefined {
  for (const [ours, theirs] of CORRUPTIONS) {
    const found = ours.exec(message)
    if (found !== null) {
      return `qcow2: Marking image as corrupt: ${theirs(...found)}; further corruption events will be suppressed`
    }
  }
  return undefined
}

const OVERHANGING = 'You can force-remove all $2 overhanging snapshots'
const TABLE = 'failed to read the snapshot table: '
const EXTRA = 'Too much extra metadata in snapshot table entry \\d+'

/** Why a check failed, what qemu-img says of it in front, and the way out that it names. */
const CHECK_FAILURES: readonly (readonly [ours: RegExp, theirs: string, hint: string])[] = [
  [new RegExp(`^(${TABLE}${EXTRA}) \\(.*`), '$1', 'You can force-remove this extra metadata'],
  [new RegExp(`^(${TABLE}Snapshot table is too big): .*last (\\d+) up.*`), '$1', OVERHANGING],
  [/^(snapshot table too large): .*last (\d+) up.*/, '$1', OVERHANGING],
]

/** Snapshot tables for which qemu-img opens no image, by why the library shows what is left of them. */
const REFUSED_TABLES: readonly (readonly [ours: RegExp, theirs: string, hint?: string])[] = [
  [/^nb_snapshots of \d+ exceeds the limit of .*/s, 'Snapshot table too large'],
  [/^invalid snapshots_offset 0x[0-9a-f]+: .*/s, 'Snapshot table offset invalid'],
  [/^snapshot table of more than \d+ bytes exceeds the limit.*/s, 'Snapshot table is too big'],
  [
    /^snapshot table entry (\d+): extra data of .* exceeds the limit of .*/s,
    'Too much extra metadata in snapshot table entry $1',
    'You can force-remove this extra metadata with qemu-img check -r all',
  ],
]

/** Why a program under qemu-img's name does not open an image whose snapshot table is damaged, and the way out. */
export function refusedTable(
  reason: string,
  program: string,
): { readonly message: string; readonly hint?: string } | undefined {
  const found = program === 'qemu-img' ? REFUSED_TABLES.find(([ours]) => ours.test(reason)) : undefined
  if (found === undefined) return undefined
  const [ours, theirs, hint] = found
  return { message: reason.replace(ours, theirs), ...(hint !== undefined && { hint }) }
}

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
  const words = program === 'qemu-img' ? [...OPENING, ...QEMU_IMG] : OPENING
  return words.reduce((said, [ours, theirs]) => said.replace(ours, theirs), message.replace(CODE, ''))
}
