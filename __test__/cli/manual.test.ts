/** The manual page, as it was built: of the commands' own table, and clean in the eyes of groff. */

import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { describe, expect, it } from 'vitest'
import { EXAMPLES } from '../../dist/cli/examples.js'
import { declared } from '../../dist/cli/manual.js'

const path = fileURLToPath(new URL('../../dist/man/qcow2.1', import.meta.url))
const page = readFileSync(path, 'utf8')
const program = await declared('qcow2')

/** What roff makes of its escapes. */
const read = (text: string): string =>
  text
    .replace(/\\f[BIR]/g, '')
    .replace(/\\-/g, '-')
    .replace(/\\\(aq/g, "'")
    .replace(/\\\(ti/g, '~')
    .replace(/\\\[u([0-9A-F]+)\]/g, (_, code: string) => String.fromCodePoint(Number.parseInt(code, 16)))

/** The part of the page about each command. */
const sections = new Map(
  page.split(/^\.SS /m).map(section => {
    const [head = '', ...rest] = section.split('\n')
    return [head.replaceAll('"', ''), read(rest.join('\n'))] as const
  }),
)

describe('the manual page', () => {
  it.each(program.commands.map(command => [command.name(), command] as const))('has all of %s', (name, command) => {
    const section = sections.get(name) ?? ''
    const shown = command.options.filter(option => !option.hidden)
    for (const option of shown)
      expect(section).toContain(`\n.TP\n${option.flags}\n${option.description.split('\n')[0]}`)
    // And none that is not there.
    expect(section.split('\n.TP\n').length - 1).toBe(shown.length)
    expect(section).toContain(command.description().split('\n')[0])
    for (const example of EXAMPLES[name] ?? []) expect(section).toContain(`qcow2 ${example}`)
  })

  it('is the one that the package names', () => {
    const manifest = readFileSync(new URL('../../package.json', import.meta.url), 'utf8')
    expect(JSON.parse(manifest)).toMatchObject({ man: './dist/man/qcow2.1' })
    expect(page.split('\n')[0]).toContain('"QCOW2" 1')
    expect(page).not.toMatch(/[^\n -~]/)
  })

  const groff = spawnSync('groff', ['--version']).status === 0
  if (!groff) process.stderr.write('SKIPPED (no groff): the manual page without warnings\n')
  it.skipIf(!groff)('is typeset without warnings', () => {
    const { status, stdout, stderr } = spawnSync('groff', ['-man', '-Tutf8', '-ww', '-rCHECKSTYLE=3', path], {
      encoding: 'utf8',
    })
    expect([status, stderr]).toEqual([0, ''])
    expect(stdout).toContain('--backing-chain')
  })
})
