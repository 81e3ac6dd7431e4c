import { mkdirSync, readdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { listed, SOURCE_FORMATS } from '../../src/formats/table.js'
import { asQemuImg, describeWithQemu, execute, haveQemu, qcow2, qemuVersion, workspace } from './run.js'

const folder = workspace()

/** The same files for each tool: some commands change them. */
async function images(at: string): Promise<void> {
  mkdirSync(at)
  await execute('qemu-img', ['create', '-q', '-f', 'qcow2', 'a.qcow2', '10M'], at)
  await execute('qemu-io', ['-f', 'qcow2', '-c', 'write -P 3 1M 1M', 'a.qcow2'], at)
  await execute('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', 'a.qcow2', '-F', 'qcow2', 'top.qcow2'], at)
  await execute('qemu-img', ['create', '-q', '-f', 'raw', 'raw', '3M'], at)
  for (const name of ['--form', 'co:lon.qcow2']) await execute('cp', ['--', './a.qcow2', `./${name}`], at)
}

const [ours, theirs] = [join(folder, 'ours'), join(folder, 'theirs')]
if (haveQemu) await Promise.all([images(ours), images(theirs)])

/** getopt names the command, and formats that are not here are named, too. */
const worded = (text: string): string =>
  text
    .replace(/^\S*qemu-img \w+:/, 'qemu-img:')
    .replace(/\nTry .*/s, '\n')
    .replace(`The formats are ${listed(SOURCE_FORMATS, 'and')}.\n`, '')

describeWithQemu('long options by their first letters, and file: names, as qemu-img takes them', () => {
  it.each([
    ['info --out json raw'],
    ['info --outp=json --back top.qcow2'],
    ['info --form qcow2 a.qcow2'],
    ['info --force a.qcow2'],
    // A value, whatever it looks like, and operands.
    ['info -f --form a.qcow2'],
    ['info -Uf --out a.qcow2'],
    ['info --form=raw -U -- --form'],
    ['info --fo qcow2 a.qcow2'],
    ['info --o json a.qcow2'],
    ['info --outputs=json a.qcow2'],
    ['map --ou=json --st 1M --ma=1M a.qcow2'],
    ['check --rep leaks a.qcow2'],
    ['check --out=json a.qcow2'],
    // Newer versions have --target-format-options, too, which leaves this one ambiguous there, and not here.
    ...(qemuVersion < 11 ? [['measure --si 1M --target-f=qcow2']] : []),
    ['measure --si 1M --target-format=qcow2'],
    ['info file:a.qcow2'],
    ['info --output=json file:a.qcow2'],
    ['info file:co:lon.qcow2'],
    ['map --output=json file:co:lon.qcow2'],
    // The backing file of a plan is not opened.
    ['measure -O qcow2 -o backing_file=nothing top.qcow2'],
    ['bitmap --gran 64k --ad a.qcow2 b'],
    ['bitmap --dis a.qcow2 b'],
    ['resize --preal=metadata a.qcow2 30M'],
    ['resize --shr a.qcow2 5M'],
  ])('%s', async line => {
    const args = line.split(' ')
    const mine = await asQemuImg(args, folder, ours)
    const other = await execute('qemu-img', args, theirs)
    const sizes = (text: string): string => text.replace(/("actual-size": |disk size: ).*/g, '$1')
    expect({ ...mine, stdout: sizes(mine.stdout), stderr: worded(mine.stderr) }).toEqual({
      ...other,
      stdout: sizes(other.stdout),
      stderr: worded(other.stderr),
    })
  })
})

it('an abbreviation that more than one option begins with is refused, naming them', async () => {
  const { code, stderr } = await qcow2(['convert', '--target', 'raw', 'a', 'b'], folder)
  expect(code).toBe(1)
  expect(stderr).toContain("option '--target' is ambiguous; possibilities: '--target-format' '--target-options'")
  expect(stderr).toContain("Try 'qcow2 convert --help'")
})

it('what comes behind -- is no option', async () => {
  const at = join(folder, 'new')
  mkdirSync(at)
  expect((await qcow2(['create', '-q', '--form', 'qcow2', '--', '--form', '1M'], at)).code).toBe(0)
  expect(readdirSync(at)).toEqual(['--form'])
  rmSync(at, { recursive: true })
})
