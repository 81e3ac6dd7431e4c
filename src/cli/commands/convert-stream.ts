/** `convert FILENAME -`: an image on standard output, front to back. */

import { isStreamed, listed, STREAMED_FORMATS } from '../../formats/table.js'
import { createQcow2Stream, type Qcow2StreamOptions, type StreamedFormat, type TargetFormat } from '../../index.js'
import { answer } from '../../support/signals.js'
import { CommandFailure, unsupported } from '../failure.js'
import { type ProgressChoice, withProgress } from '../progress.js'
import type { Session } from '../session.js'
import { sourceOf } from '../sources.js'

/** What stands for standard output; a file of that name is `./-`. */
export const STANDARD_OUTPUT = '-'

/** Options of the command that need a target which can be read, or written to twice. */
const OF_FILES = {
  backing: '-B',
  bitmaps: '--bitmaps',
  salvage: '--salvage',
  rate: '-r',
  sparseSize: '-S',
  targetImageOpts: '--target-image-opts',
} as const

/** Refuses what an image on standard output cannot have; tells its format. */
export function streamedFormat(
  to: TargetFormat,
  given: Partial<Record<keyof typeof OF_FILES, unknown>> & { readonly create: boolean },
  session: Session,
): StreamedFormat {
  for (const [name, option] of Object.entries(OF_FILES)) {
    if (given[name as keyof typeof OF_FILES] === undefined) continue
    throw unsupported(`${option} with standard output`, 'it is written once, front to back')
  }
  if (!given.create) throw unsupported('-n with standard output', 'nothing is there to be written into')
  if (session.stdout.isTerminal) {
    throw new CommandFailure('Standard output is a terminal: an image goes to a file or a pipe', {
      hint: "A file of the name '-' is written './-'.",
    })
  }
  if (isStreamed(to)) return to
  const formats = listed(STREAMED_FORMATS, 'and')
  throw unsupported(`Writing ${to} to standard output`, `only ${formats} can be written front to back`)
}

/** The output takes no more. Who closed it knows, and what else is the matter with it is told where it is noticed. */
class OutputLost extends Error {}

/** Writes the image; resolves to the exit code when the reader has all of it. One who goes away early ends it, quietly. */
export async function writeImage(
  sources: readonly string[],
  options: Qcow2StreamOptions,
  choice: ProgressChoice,
  session: Session,
): Promise<number> {
  // What is told meanwhile goes where it is in nobody's way.
  const aside: Session = Object.create(session, { stdout: { value: session.stderr } })
  try {
    await withProgress(aside, choice, async job => {
      const opened = await Promise.all(sources.map(name => sourceOf(name, session)))
      const stream = await createQcow2Stream(opened, { ...options, ...job })
      for await (const chunk of stream) await answer(() => writeChunk(chunk, session), session.signal)
    })
    return 0
  } catch (error) {
    if (error instanceof OutputLost) return 1
    // A chunk may be on its way to a reader that has stopped.
    if (session.signal.aborted) session.stdout.abandon()
    throw error
  }
}

/** Resolves when the system has all of the chunk. */
function writeChunk(chunk: Buffer, { stdout }: Session): Promise<void> {
  return new Promise((resolve, reject) => {
    stdout.stream.write(chunk, error => (error ? reject(new OutputLost(error.message, { cause: error })) : resolve()))
  })
}
