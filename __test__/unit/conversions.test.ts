/** Every place where bytes of a name become text, or text bytes: what it does with those that are not UTF-8. */

import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, it } from 'vitest'

const root = fileURLToPath(new URL('../..', import.meta.url))

const FOR_PEOPLE = 'a message shows replacement characters; nothing is looked up or opened by it'
const EXACT = 'keeps every byte: unit/text.test.ts, api/names.test.ts'
const TAKES_APART = 'takes strings apart that keep every byte'
const OURS = 'no name of a user: the package, the program, a magic number'

const RUST: Readonly<Record<string, string>> = {
  'crates/core/src/error.rs': FOR_PEOPLE,
  'crates/core/src/inspect.rs': FOR_PEOPLE,
  'crates/core/src/parent_name.rs': FOR_PEOPLE,
  'crates/core/src/storage/new_file.rs': 'a part of the hidden name of a file that has none yet',
  'crates/engine/src/bitmap/copy.rs': FOR_PEOPLE,
  'crates/engine/src/bitmap/manage.rs': FOR_PEOPLE,
  'crates/engine/src/check/bitmaps.rs': FOR_PEOPLE,
  'crates/engine/src/check/snapshots.rs': FOR_PEOPLE,
  'crates/engine/src/image/bitmaps.rs': FOR_PEOPLE,
  'crates/engine/src/image/qcow2.rs': FOR_PEOPLE,
  'crates/engine/src/image/snapshots.rs': FOR_PEOPLE,
  'crates/engine/src/maintenance/resize.rs': FOR_PEOPLE,
  'crates/format/src/header/feature.rs': FOR_PEOPLE,
  'crates/luks/src/luks1/header.rs': 'names of ciphers and modes: others than ASCII are refused',
  'crates/luks/src/luks2/mod.rs':
    'a UUID and a label, which are shown; names of ciphers, of which others than ASCII are not known',
  'crates/nbd/src/client/connect.rs': FOR_PEOPLE,
  'crates/nbd/src/client/handshake.rs': FOR_PEOPLE,
  'crates/nbd/src/client/uri.rs':
    'a host, which is text, others are refused; names of exports and paths keep every byte, on Windows text alone',
  'crates/nbd/src/server/listener.rs': FOR_PEOPLE,
  'crates/node/src/panics.rs': 'in no addon that is shipped',
  'crates/node/src/source/mod.rs': FOR_PEOPLE,
  'crates/node/src/text.rs': `${EXACT}; on Windows a path that is no Unicode is refused`,
  'crates/ovf/src/lib.rs': 'a document, which is UTF-8: others are refused',
  'crates/parallels/src/bundle.rs': FOR_PEOPLE,
  'crates/parallels/src/descriptor.rs': 'a document, which is UTF-8: others are refused',
  'crates/vmdk/src/descriptor.rs': 'numbers, types and messages; names of extents and parents keep every byte',
  'crates/vmdk/src/layer/check.rs': FOR_PEOPLE,
  'crates/vmdk/src/layer/mod.rs': FOR_PEOPLE,
  'crates/vmdk/src/new/mod.rs': 'keeps every byte: cli/names.test.ts; on Windows a name is text',
  'crates/vmdk/src/new/options.rs': FOR_PEOPLE,
  'crates/vpc/src/layer.rs': FOR_PEOPLE,
  'crates/vpc/src/parent.rs':
    'names that the format stores as UTF-16 or as a URL: others are no parent, and a new image refuses them',
}

const TYPESCRIPT: Readonly<Record<string, string>> = {
  'src/addon.ts': OURS,
  'src/cli.ts': 'arguments with replacement characters are read again from /proc: cli/names.test.ts',
  'src/cli/arguments.ts': 'what is handed on to this program, started again: base64 of the bytes',
  'src/cli/commands/commit.ts': TAKES_APART,
  'src/cli/commands/create.ts': TAKES_APART,
  'src/cli/commands/info.ts': TAKES_APART,
  'src/cli/commands/nbd.ts':
    'of the temporary overlay only: below a folder whose name is no text, its backing file is not found',
  'src/cli/commands/shims.ts': TAKES_APART,
  'src/cli/format/report-page.ts': FOR_PEOPLE,
  'src/cli/io/disk.ts': 'of the temporary overlay only, as for nbd',
  'src/cli/main.ts': OURS,
  'src/cli/secrets.ts': TAKES_APART,
  'src/cli/start.ts': `${OURS}; a cache folder whose name is no text is not found, and nothing is kept`,
  'src/cli/tls-objects.ts': 'names of users and passphrases, which Node hands to OpenSSL as text: others never fit',
  'src/formats/manifest.ts': 'names of files, which are compared with those of members; others are missing',
  'src/formats/ova.ts': 'names of members are shown; they are found by their place',
  'src/formats/sizes.ts': OURS,
  'src/formats/table.ts': OURS,
  'src/ingest.ts': TAKES_APART,
  'src/jobs/roots.ts':
    'the paths of jobs are JSON, which is text; what links lead to, and what images name, keeps every byte',
  'src/jobs/target.ts': TAKES_APART,
  'src/remote/address.ts': 'an address of the web and its user, which are text',
  'src/text.ts': EXACT,
}

/** Files below a folder that have a match. */
function matching(folder: string, ending: string, pattern: RegExp): string[] {
  const entries = readdirSync(join(root, folder), { recursive: true, encoding: 'utf8' })
  const files = entries.filter(name => name.endsWith(ending)).map(name => `${folder}/${name.replaceAll('\\', '/')}`)
  return files.filter(file => pattern.test(readFileSync(join(root, file), 'utf8')))
}

describe('a conversion between bytes and text', () => {
  // All that is no help of tests: a crate that is added is among them.
  const crates = readdirSync(join(root, 'crates')).filter(name => name !== 'testkit' && name !== 'fuzz')
  it.each(crates.map(name => `crates/${name}/src`))('in %s is one of those that are known', folder => {
    const pattern = /from_utf|to_string_lossy|into_string\(\)|\.to_str\(\)|\.display\(\)|char::from\(/
    const found = matching(folder, '.rs', pattern).filter(file => !file.endsWith('/tests.rs'))
    expect(found.sort()).toEqual(Object.keys(RUST).filter(file => file.startsWith(`${folder}/`)))
  })

  it('in src is one of those that are known', () => {
    const pattern = /TextDecoder|node:path|\.toString\(\)|\.toString\('|process\.cwd|process\.argv/
    expect(matching('src', '.ts', pattern).sort()).toEqual(Object.keys(TYPESCRIPT))
  })
})
