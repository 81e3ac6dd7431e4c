/**
 * What qemu-img says in place of messages of this program's: programs that run qemu-img compare its messages to the letter. Said under
 * its name only; under our own there is more to read.
 */

/** What a message is, and what is said for it. All that fit are said, in this order. */
const WORDS: readonly (readonly [ours: RegExp, theirs: string])[] = [
  // Programs look for no codes, and QEMU has none.
  [/( \(field [^()]*\))?( \(ERR_[A-Z0-9_]+\))$/, ''],
  [/: invalid l1_size 0x[0-9a-f]+: the virtual size is too big$/, ': Image is too big'],
  [/: invalid l1_size 0x[0-9a-f]+: the L1 table is too small for the virtual size$/, ': L1 table is too small'],
  [
    /^(Could not create snapshot '.*'): host cluster \d+ has a refcount of \d+, and its references counted once more would exceed .*$/s,
    '$1: Invalid argument',
  ],
]

/** A message in qemu-img's words. */
export const asQemu = (message: string): string =>
  WORDS.reduce((said, [ours, theirs]) => said.replace(ours, theirs), message)
